"""The biased loss against numbers worked out by hand and scikit-learn."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from conftest import close
from loss import biased_loss, branch_loss, equal_loss


def branches(*shapes, seed=0):
    """Random logits: branch -> a tensor for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return {branch: [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
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
