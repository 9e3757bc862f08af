"""The biased loss against numbers worked out by hand and scikit-learn."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from conftest import close
from loss import biased_loss, branch_loss, clnet_loss, dice_loss, equal_loss, focal

def branches(*shapes, seed=0):
    """Random logits: branch -> a tensor for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return {branch: [torch.randn(shape, generator=generator, dtype=torch.float64,
                                 requires_grad=True) for shape in shapes]
            for branch in ("clinical", "dermoscopy", "fusion")}

def test_two_lesions_by_hand():
    """One task of two classes; logits (a, b) cost log(1 + e^(b - a)) for class 0."""
    labels = torch.tensor([[0], [1]])
    outputs = {branch: [torch.tensor([[a, 0.0], [0.0, b]])]
               for branch, a, b in (("clinical", 0, 0), ("dermoscopy", 1, 3), ("fusion", 2, 2))}
    def cost(a):
        return math.log(1 + math.exp(-a))
    l_c, l_d, l_f = math.log(2), (cost(1) + cost(3)) / 2, cost(2)  # 0.6931, 0.1809, 0.1269
    total, parts = biased_loss(outputs, labels, 0.1)
    assert list(parts) == ["clinical", "dermoscopy", "fusion"]
    close(torch.stack([total, *parts.values()]), [0.1 * l_c + 0.4 * l_d + 0.5 * l_f, l_c, l_d, l_f], 1e-6)
    close(equal_loss(outputs, labels)[0], (l_c + l_d + l_f) / 3, 1e-6)
    assert abs(total - 0.2051) < 5e-5

def test_branch_loss_is_scikit_learns_log_loss_averaged_over_tasks():
    logits, rng = branches((40, 5), (40, 2), (40, 3))["fusion"], np.random.default_rng(0)
    labels = torch.tensor(np.stack([rng.integers(-1, n, 40) for n in (5, 2, 3)], 1))
    expected = np.mean([log_loss(y[y >= 0], z.softmax(1).detach()[y >= 0], labels=range(z.shape[1]))
                        for z, y in zip(logits, labels.T)])
    close(branch_loss(logits, labels), expected)

def test_unknown_labels_and_tasks_are_left_out():
    logits = branches((4, 3), (4, 2))["fusion"]
    labels = torch.tensor([[0, -1], [2, -1], [-1, -1], [1, -1]])
    expected = branch_loss([logits[0][[0, 1, 3]]], labels[[0, 1, 3], :1])
    close(branch_loss(logits, labels), expected)
    gradients = torch.autograd.grad(branch_loss(logits, labels), logits)
    assert not gradients[0][2].any() and not gradients[1].any()
    assert branch_loss(logits, torch.full((4, 2), -1)) == 0

@pytest.mark.parametrize("w", [0.0, 0.1, 0.4])
def test_gradients_of_the_branches_are_those_of_eq_3(w):
    outputs, labels = branches((6, 3), (6, 2)), torch.randint(0, 2, (6, 2))
    biased_loss(outputs, labels, w)[0].backward()
    for branch, weight in (("clinical", w), ("dermoscopy", 0.5 - w), ("fusion", 0.5)):
        alone = torch.autograd.grad(branch_loss(outputs[branch], labels), outputs[branch])
        for logits, gradient in zip(outputs[branch], alone):
            close(logits.grad, weight * gradient)

@pytest.mark.parametrize("labels, error", [
    (torch.tensor([[0, 3], [0, 0]]), IndexError),  # torch's own: "Target 3 is out of bounds"
    (torch.tensor([[0, 0], [-2, 0]]), IndexError),
    (torch.tensor([[0.0, 1.0], [0.0, 1.0]]), ValueError),
    (torch.tensor([0, 1]), ValueError),
    (torch.zeros(2, 3, dtype=torch.int64), ValueError),
], ids=["too large", "too small", "float", "one dimension", "too many tasks"])
def test_labels_that_do_not_fit_are_refused(labels, error):
    with pytest.raises(error):
        biased_loss(branches((2, 5), (2, 3)), labels)

def test_a_model_of_one_branch_has_that_branchs_loss():
    logits, labels = branches((6, 3))["dermoscopy"], torch.randint(0, 3, (6, 1))
    total, parts = biased_loss({"dermoscopy": logits}, labels)
    assert list(parts) == ["dermoscopy"] and not parts["dermoscopy"].requires_grad
    close(total, branch_loss(logits, labels))

# ------------------------------------------------------------------------------------------------------ CLNet's losses

def test_focal_with_gamma_0_is_cross_entropy_and_by_hand():
    cost = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    close(focal(cost, 0), cost)
    p = 0.25  # of the truth: (1 - 0.25)^2 * log 4
    close(focal(torch.tensor(-math.log(p), dtype=torch.float64), 2.0), 0.5625 * math.log(4))

def test_focal_branch_loss_leaves_out_unknown_labels_and_has_their_mean():
    logits, labels = branches((5, 3), (5, 2))["fusion"], torch.tensor([[0, -1], [2, 1], [-1, -1], [1, 0], [1, 1]])
    expected = []
    for t, z in enumerate(logits):
        known = labels[:, t] >= 0
        p = z.softmax(1)[known, labels[known, t]]
        expected.append(((1 - p) ** 2 * -p.log()).mean())
    close(branch_loss(logits, labels, 2.0), sum(expected) / 2)
    gradients = torch.autograd.grad(branch_loss(logits, labels, 2.0), logits)
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[0][2].any()

@pytest.mark.parametrize("found, given, expected", [
    ([1, 1, 0, 0], [1, 1, 0, 0], 0.0),  # perfect
    ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),  # empty and found empty
    ([1, 1, 1, 1], [0, 0, 0, 0], 1 - 1 / 5),
    ([0, 0, 0, 0], [1, 1, 1, 1], 1 - 1 / 5),
    ([1, 1, 0, 0], [0, 1, 1, 0], 1 - 3 / 5),
])
def test_dice_by_hand(found, given, expected):
    logits = 1000 * (torch.tensor(found, dtype=torch.float64) - 0.5).view(1, 1, 2, 2)
    assert abs(dice_loss(logits, torch.tensor(given, dtype=torch.float64).view(1, 1, 2, 2)) - expected) < 1e-9

def test_clnet_loss_is_the_sum_of_its_parts():
    logits, labels = branches((2, 3))["dermoscopy"], torch.tensor([[0], [2]])
    z, mask = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 1, 4, 4)).float()
    total, parts = clnet_loss({"dermoscopy": logits, "mask": z}, labels, mask)
    p = torch.where(mask == 1, z.sigmoid(), 1 - z.sigmoid())
    close(parts["mask"], (-(1 - p) ** 2 * p.log()).mean() + dice_loss(z, mask), 1e-5)
    close(parts["dermoscopy"], branch_loss(logits, labels, 2.0))
    close(total, parts["mask"] + parts["dermoscopy"], 1e-6)
    assert list(clnet_loss({"mask": z}, labels, mask)[1]) == ["mask"]
