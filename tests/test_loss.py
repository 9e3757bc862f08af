"""The biased loss by hand: the second half of what loss.py teaches.

The method comes first: two lesions on paper, one branch in plain loops and by scikit-learn, then
Eq. 1 to 3, values and gradients. From "regression" on follow refusals, CLNet's losses and the
choice between the losses; a reader of the method can skip them.

Shapes: B lesions, T tasks, n_t classes of task t.

close(ours, expected, tolerance) of conftest.py fails if the largest difference, as a share of the
largest expected value, is above the tolerance. Without one it is 1e-9, which suits float64; float32
needs 1e-6.
"""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

import loss as loss_file
from conftest import close
from loss import (
    biased_loss,
    branch_loss,
    clnet_loss,
    cross_entropies,
    dice_loss,
    equal_loss,
    focal,
    make_criterion,
    mean_over_known,
    weighted_loss,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def random_logits(B, num_classes):
    """T tensors (B, n_t)."""
    logits = []
    for n in num_classes:
        logits.append(torch.randn(B, n, dtype=torch.float64, requires_grad=True))
    return logits


def random_outputs(B, num_classes, branches=("clinical", "dermoscopy", "fusion")):
    return {branch: random_logits(B, num_classes) for branch in branches}


# -------------------------------------------------------------------------------------- two lesions


def cost_of_logits(right, wrong):
    """Of two classes: -log(e^right / (e^right + e^wrong)) = log(1 + e^(wrong - right))."""
    return math.log(1 + math.exp(wrong - right))


def test_two_lesions_on_paper():
    """One task of two classes; the first lesion is of class 0, the second of class 1."""
    labels = torch.tensor([[0], [1]])
    outputs = {
        "clinical": [torch.zeros(2, 2)],  # undecided: log 2 = 0.6931
        "dermoscopy": [torch.tensor([[1.0, 0.0], [0.0, 3.0]])],  # both right
        "fusion": [torch.tensor([[2.0, 0.0], [0.0, 2.0]])],  # both right, equally sure
    }
    clinical = math.log(2)
    dermoscopy = (cost_of_logits(1, 0) + cost_of_logits(3, 0)) / 2  # (0.3133 + 0.0486) / 2
    fusion = cost_of_logits(2, 0)  # 0.1269

    biased, losses = biased_loss(outputs, labels, w=0.1)
    assert list(losses) == ["clinical", "dermoscopy", "fusion"]
    close(losses["clinical"], clinical, 1e-6)
    close(losses["dermoscopy"], dermoscopy, 1e-6)
    close(losses["fusion"], fusion, 1e-6)
    close(biased, 0.1 * clinical + 0.4 * dermoscopy + 0.5 * fusion, 1e-6)
    assert round(biased.item(), 4) == 0.2051

    equal, _ = equal_loss(outputs, labels)
    close(equal, (clinical + dermoscopy + fusion) / 3, 1e-6)


def test_the_gradient_on_paper():
    """By a logit, cross-entropy has the gradient p - y: probability minus 1 for the true class.

    With logits log 3 and 0 the probabilities are 3/4 and 1/4. A mean over two lesions halves it,
    and Eq. 3 multiplies it with the branch's weight.
    """
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], requires_grad=True)
    undecided = torch.zeros(2, 2)
    labels = torch.tensor([[0], [1]])
    outputs = {"clinical": [logits], "dermoscopy": [undecided], "fusion": [undecided]}
    total, _ = biased_loss(outputs, labels, w=0.1)
    total.backward()
    p_minus_y = torch.tensor([[3 / 4 - 1, 1 / 4], [3 / 4, 1 / 4 - 1]])
    close(logits.grad, 0.1 * p_minus_y / 2, 1e-6)


# --------------------------------------------------------------------------------------- one branch

# Labels of five lesions and three tasks of 3, 2 and 4 classes. Nobody knows the third lesion's
# labels, nor a label of the third task.
LABELS = torch.tensor([[0, 1, -1], [2, -1, -1], [-1, -1, -1], [1, 0, -1], [1, 1, -1]])


def branch_loss_in_loops(logits, labels):
    """The mean over known lesions of each task, then the mean over tasks with a known lesion."""
    task_losses = []
    for t, task_logits in enumerate(logits):
        costs = []
        for b, lesion_logits in enumerate(task_logits):
            label = int(labels[b, t])
            if label == -1:
                continue
            probability = lesion_logits[label].exp() / lesion_logits.exp().sum()
            costs.append(-probability.log())
        if costs:
            task_losses.append(sum(costs) / len(costs))
    return sum(task_losses) / len(task_losses)


def test_one_branch_in_plain_loops():
    logits = random_logits(5, (3, 2, 4))
    ours = branch_loss(logits, LABELS)
    expected = branch_loss_in_loops(logits, LABELS)
    close(ours, expected)
    our_gradients = torch.autograd.grad(ours, logits)
    their_gradients = torch.autograd.grad(expected, logits[:2])
    close(our_gradients[0], their_gradients[0])
    close(our_gradients[1], their_gradients[1])
    assert not our_gradients[0][2].any()  # of the third lesion
    assert not our_gradients[2].any()  # of the third task


def test_one_branch_is_scikit_learns_log_loss_averaged_over_tasks():
    num_classes = (5, 2, 3)
    logits = random_logits(40, num_classes)
    labels = torch.stack([torch.randint(-1, n, (40,)) for n in num_classes], dim=1)
    task_losses = []
    for t, n in enumerate(num_classes):
        known = labels[:, t] >= 0
        probabilities = logits[t].detach().softmax(1)
        task_losses.append(log_loss(labels[known, t], probabilities[known], labels=range(n)))
    close(branch_loss(logits, labels), np.mean(task_losses))


def test_without_a_known_label_the_loss_is_zero():
    logits = random_logits(4, (3, 2))
    loss = branch_loss(logits, torch.full((4, 2), -1))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, logits):
        assert not gradient.any()


# --------------------------------------------------------------------------------------- Eq. 1 to 3


def assert_weights(total, outputs, labels, weights):
    """Is `total` the weighted sum of the branches' losses? Each gradient must have its weight."""
    expected = 0
    for branch, weight in weights.items():
        expected += weight * branch_loss(outputs[branch], labels).item()
    close(total, expected)
    for branch, weight in weights.items():
        logits = outputs[branch]
        our_gradients = torch.autograd.grad(total, logits, retain_graph=True)
        branch_gradients = torch.autograd.grad(branch_loss(logits, labels), logits)
        for ours, of_branch in zip(our_gradients, branch_gradients):
            close(ours, weight * of_branch)


def test_eq_1():
    outputs = random_outputs(5, (3, 2, 4))
    total, _ = equal_loss(outputs, LABELS)
    assert_weights(
        total, outputs, LABELS, {"clinical": 1 / 3, "dermoscopy": 1 / 3, "fusion": 1 / 3}
    )


def test_eq_2():
    outputs = random_outputs(5, (3, 2, 4))
    weights = {"clinical": 0.7, "dermoscopy": 0.2, "fusion": 1.5}
    total, _ = weighted_loss(outputs, LABELS, weights)
    assert_weights(total, outputs, LABELS, weights)


@pytest.mark.parametrize("w", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])  # the columns of Table 7
def test_eq_3(w):
    outputs = random_outputs(5, (3, 2, 4))
    total, _ = biased_loss(outputs, LABELS, w)
    assert_weights(total, outputs, LABELS, {"clinical": w, "dermoscopy": 0.5 - w, "fusion": 0.5})


def test_eq_3_has_the_papers_w():
    outputs = random_outputs(5, (3, 2, 4))
    total, _ = biased_loss(outputs, LABELS)
    assert_weights(total, outputs, LABELS, {"clinical": 0.1, "dermoscopy": 0.4, "fusion": 0.5})


@pytest.mark.parametrize("loss_function", [biased_loss, equal_loss])
def test_a_network_of_one_branch_has_that_branchs_loss(loss_function):
    outputs = random_outputs(5, (3, 2, 4), branches=["dermoscopy"])
    total, losses = loss_function(outputs, LABELS)
    assert list(losses) == ["dermoscopy"]
    assert_weights(total, outputs, LABELS, {"dermoscopy": 1})


def test_a_fourth_branch_counts_a_quarter_in_eq_1():
    branches = ["clinical", "dermoscopy", "fusion", "mean"]
    outputs = random_outputs(5, (3, 2, 4), branches)
    total, losses = equal_loss(outputs, LABELS)
    assert list(losses) == branches
    assert_weights(total, outputs, LABELS, dict.fromkeys(branches, 1 / 4))


# The tutorial ends here. The regression nets that follow guard refusals, CLNet and the choice.

# --------------------------------------------------------------------------------------- regression


def test_weights_must_be_those_of_the_branches():
    """A fourth branch has no weight in Eq. 3, and a weight without its branch would be lost."""
    outputs = random_outputs(5, (3, 2, 4), ["clinical", "dermoscopy", "fusion", "mean"])
    with pytest.raises(ValueError, match="but the branches are .*'mean'"):
        biased_loss(outputs, LABELS)
    with pytest.raises(ValueError, match="weights for "):
        weighted_loss({"fusion": outputs["fusion"]}, LABELS, {"fusion": 1, "mean": 1})


def test_the_losses_for_the_log_are_detached():
    outputs = random_outputs(5, (3, 2, 4))
    total, losses = biased_loss(outputs, LABELS)
    assert total.requires_grad
    for branch, logits in outputs.items():
        assert not losses[branch].requires_grad
        close(losses[branch], branch_loss(logits, LABELS))


@pytest.mark.parametrize(
    "labels, error",
    [
        pytest.param(torch.tensor([[0, 3], [0, 0]]), IndexError, id="too large"),  # torch's own
        pytest.param(torch.tensor([[0, 0], [-2, 0]]), IndexError, id="below -1"),
        pytest.param(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), ValueError, id="float"),
        pytest.param(torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), ValueError, id="int32"),
        pytest.param(torch.tensor([0, 1]), ValueError, id="one dimension"),
        pytest.param(torch.zeros(2, 3, dtype=torch.int64), ValueError, id="too many tasks"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int64), ValueError, id="too many lesions"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, error):
    with pytest.raises(error):
        biased_loss(random_outputs(2, (5, 3)), labels)


def test_the_worked_example_prints_what_it_says(capsys):
    """python loss.py"""
    loss_file.main()
    lines = capsys.readouterr().out.splitlines()
    printed = [float(line.split("=")[-1]) for line in lines]
    clinical = math.log(2)
    dermoscopy = (cost_of_logits(2, 0) + cost_of_logits(1, 0)) / 2
    fusion = (cost_of_logits(3, 0) + cost_of_logits(2, 0)) / 2
    biased = 0.1 * clinical + 0.4 * dermoscopy + 0.5 * fusion
    equal = (clinical + dermoscopy + fusion) / 3
    expected = [clinical, dermoscopy, fusion, biased, equal]
    assert np.abs(np.array(printed) - expected).max() < 6e-5  # four digits are printed


# CLNet's losses.


@pytest.mark.parametrize(
    "probability, expected",
    [
        (0.25, 0.75**2 * math.log(4)),  # the truth was hardly believed
        (0.50, 0.50**2 * math.log(2)),
        (0.99, 0.01**2 * math.log(1 / 0.99)),  # an easy case costs nearly nothing
        (1.00, 0.0),
    ],
)
def test_focal_on_paper(probability, expected):
    cross_entropy = torch.tensor(-math.log(probability), dtype=torch.float64)
    close(focal(cross_entropy), expected, 1e-9)


def test_focal_loss_of_a_branch_in_plain_loops():
    logits = random_logits(5, (3, 2))
    labels = LABELS[:, :2]
    ours = mean_over_known(focal(cross_entropies(logits, labels)), labels)
    task_losses = []
    for t, task_logits in enumerate(logits):
        costs = []
        for b in range(5):
            if labels[b, t] >= 0:
                p = task_logits[b].softmax(0)[labels[b, t]]
                costs.append((1 - p) ** 2 * -p.log())
        task_losses.append(sum(costs) / len(costs))
    expected = sum(task_losses) / 2
    close(ours, expected)
    our_gradients = torch.autograd.grad(ours, logits)
    their_gradients = torch.autograd.grad(expected, logits)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients):
        close(our_gradient, their_gradient)


@pytest.mark.parametrize(
    "found, mask, expected",
    [
        #                            1 - (2 * common + 1) / (found + mask + 1)
        ([1, 1, 0, 0], [1, 1, 0, 0], 1 - 5 / 5),  # perfect
        ([0, 0, 0, 0], [0, 0, 0, 0], 1 - 1 / 1),  # empty, and found empty
        ([1, 1, 1, 1], [0, 0, 0, 0], 1 - 1 / 5),
        ([0, 0, 0, 0], [1, 1, 1, 1], 1 - 1 / 5),
        ([1, 1, 0, 0], [0, 1, 1, 0], 1 - 3 / 5),  # half of each
    ],
)
def test_dice_on_paper(found, mask, expected):
    logits = 1000 * (torch.tensor(found, dtype=torch.float64) - 0.5)  # a sigmoid of 0 or 1
    mask = torch.tensor(mask, dtype=torch.float64)
    loss = dice_loss(logits.view(1, 1, 2, 2), mask.view(1, 1, 2, 2))
    assert abs(loss - expected) < 1e-9


def test_dice_is_the_mean_over_lesions():
    logits = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    mask = torch.randint(0, 2, (3, 1, 4, 4)).double()
    total = 0
    for b in range(3):
        total += dice_loss(logits[b : b + 1], mask[b : b + 1])
    close(dice_loss(logits, mask), total / 3)


def clnet_outputs_and_batch():
    outputs = {
        "dermoscopy": random_logits(5, (3, 2, 4)),
        "mask": torch.randn(5, 1, 4, 4, requires_grad=True),
    }
    batch = {"labels": LABELS, "mask": torch.randint(0, 2, (5, 1, 4, 4)).float()}
    return outputs, batch


def test_clnet_loss_is_the_sum_of_its_parts():
    outputs, batch = clnet_outputs_and_batch()
    total, losses = clnet_loss(outputs, batch)
    assert list(losses) == ["dermoscopy", "mask"]

    class_costs = focal(cross_entropies(outputs["dermoscopy"], LABELS))
    close(losses["dermoscopy"], mean_over_known(class_costs, LABELS))

    logits = outputs["mask"]
    mask = batch["mask"]
    of_lesion = logits.sigmoid()
    of_skin = 1 - of_lesion
    p = torch.where(mask == 1, of_lesion, of_skin)  # of the truth
    pixel_costs = (1 - p) ** 2 * -p.log()
    close(losses["mask"], pixel_costs.mean() + dice_loss(logits, mask), 1e-5)

    close(total, losses["dermoscopy"] + losses["mask"], 1e-6)
    total.backward()
    assert logits.grad.any()
    assert outputs["dermoscopy"][0].grad.any()
    assert not losses["mask"].requires_grad


@pytest.mark.parametrize("branch, needed", [("dermoscopy", "labels"), ("mask", "mask")])
def test_clnet_that_learns_one_thing_has_only_that_loss(branch, needed):
    outputs, batch = clnet_outputs_and_batch()
    _, both = clnet_loss(outputs, batch)
    total, losses = clnet_loss({branch: outputs[branch]}, {needed: batch[needed]})
    assert list(losses) == [branch]
    close(total, both[branch])


def test_a_mask_of_bfloat16_logits_is_judged_in_float32():
    outputs, batch = clnet_outputs_and_batch()
    rounded = outputs["mask"].bfloat16()
    total, _ = clnet_loss({"mask": rounded}, batch)
    expected, _ = clnet_loss({"mask": rounded.float()}, batch)
    assert total.dtype == torch.float32
    assert total == expected


def test_very_sure_answers_have_finite_gradients():
    class_logits = torch.tensor([[500.0, 0.0], [0.0, 500.0]], requires_grad=True)
    mask_logits = torch.tensor([500.0, -500.0]).view(2, 1, 1, 1)
    mask_logits.requires_grad_()
    labels = torch.tensor([[0], [0]])  # the first lesion is right, the second wrong
    batch = {"labels": labels, "mask": torch.ones(2, 1, 1, 1)}
    total, _ = clnet_loss({"dermoscopy": [class_logits], "mask": mask_logits}, batch)
    total.backward()
    assert class_logits.grad.isfinite().all()
    assert mask_logits.grad.isfinite().all()


# The choice between the losses.

THIRDS = {"clinical": 1 / 3, "dermoscopy": 1 / 3, "fusion": 1 / 3}


@pytest.mark.parametrize(
    "model, loss, w, weights",
    [
        ("pemm", "biased", 0.1, {"clinical": 0.1, "dermoscopy": 0.4, "fusion": 0.5}),
        ("pemm", "biased", 0.3, {"clinical": 0.3, "dermoscopy": 0.2, "fusion": 0.5}),
        ("pemm", "equal", 0.1, THIRDS),
        ("pemm", "biased", 0.1, {"clinical": 1}),  # --modality clinical
        ("ammfm", "biased", 0.2, {"clinical": 0.2, "dermoscopy": 0.3, "fusion": 0.5}),
        ("ammfm", "equal", 0.1, THIRDS),
        ("mat", "biased", 0.1, {"fusion": 1}),
        ("mat", "equal", 0.1, {"fusion": 1}),
    ],
)
def test_the_flags_choose_the_loss(model, loss, w, weights):
    outputs = random_outputs(5, (3, 2, 4), branches=list(weights))
    criterion = make_criterion({"model": model, "loss": loss, "w": w})
    total, losses = criterion(outputs, {"labels": LABELS})
    assert list(losses) == list(weights)
    assert_weights(total, outputs, LABELS, weights)


@pytest.mark.parametrize("loss", ["biased", "equal"])
def test_clnet_has_a_loss_of_its_own(loss):
    outputs, batch = clnet_outputs_and_batch()
    criterion = make_criterion({"model": "clnet", "loss": loss, "w": 0.1})
    total, losses = criterion(outputs, batch)
    expected_total, expected_losses = clnet_loss(outputs, batch)
    assert total == expected_total
    assert losses == expected_losses


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="unknown loss 'focal'"):
        make_criterion({"model": "pemm", "loss": "focal", "w": 0.1})
