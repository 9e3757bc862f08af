"""The biased loss against numbers worked out by hand and scikit-learn."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from conftest import close
from loss import biased_loss, branch_loss, equal_loss


def branches(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
            for _ in range(3)]


def test_two_lesions_by_hand():
    """One task of two classes; logits (a, b) cost log(1 + e^(b - a)) for class 0."""
    labels = torch.tensor([[0], [1]])
    outputs = [[torch.tensor([[a, 0.0], [0.0, b]])] for a, b in ((0, 0), (1, 3), (2, 2))]
    def cost(a):
        return math.log(1 + math.exp(-a))
    l_c, l_d, l_f = math.log(2), (cost(1) + cost(3)) / 2, cost(2)  # 0.6931, 0.1809, 0.1269
    found = biased_loss(outputs, labels, 0.1)
    close(torch.stack(list(found)), [0.1 * l_c + 0.4 * l_d + 0.5 * l_f, l_c, l_d, l_f], 1e-6)
    close(equal_loss(outputs, labels).total, (l_c + l_d + l_f) / 3, 1e-6)
    assert abs(found.total - 0.2051) < 5e-5


def test_branch_loss_is_scikit_learns_log_loss_averaged_over_tasks():
    (logits, _, _), rng = branches((40, 5), (40, 2), (40, 3)), np.random.default_rng(0)
    labels = torch.tensor(np.stack([rng.integers(-1, n, 40) for n in (5, 2, 3)], 1))
    expected = np.mean([log_loss(y[y >= 0], z.softmax(1).detach()[y >= 0], labels=range(z.shape[1]))
                        for z, y in zip(logits, labels.T)])
    close(branch_loss(logits, labels), expected)


def test_unknown_labels_and_tasks_are_left_out():
    (logits, _, _) = branches((4, 3), (4, 2))
    labels = torch.tensor([[0, -1], [2, -1], [-1, -1], [1, -1]])
    expected = branch_loss([logits[0][[0, 1, 3]]], labels[[0, 1, 3], :1])
    close(branch_loss(logits, labels), expected)
    gradients = torch.autograd.grad(branch_loss(logits, labels), logits)
    assert not gradients[0][2].any() and not gradients[1].any()
    assert branch_loss(logits, torch.full((4, 2), -1)) == 0


@pytest.mark.parametrize("w", [0.0, 0.1, 0.4])
def test_gradients_of_the_branches_are_those_of_eq_3(w):
    outputs, labels = branches((6, 3), (6, 2)), torch.randint(0, 2, (6, 2))
    biased_loss(outputs, labels, w).total.backward()
    for branch, weight in zip(outputs, (w, 0.5 - w, 0.5)):
        alone = torch.autograd.grad(branch_loss(branch, labels), branch)
        for logits, gradient in zip(branch, alone):
            close(logits.grad, weight * gradient)


@pytest.mark.parametrize("labels, says", [
    (torch.tensor([[0, 3], [0, 0]]), "task 1 has 3 classes, but labels from 0 to 3"),
    (torch.tensor([[0, 0], [-2, 0]]), "task 0 has 5 classes, but labels from -2 to 0"),
    (torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "int64"),
    (torch.tensor([0, 1]), "2 tasks and 2 pairs"),
    (torch.zeros(2, 3, dtype=torch.int64), "2 tasks and 2 pairs"),
], ids=["too large", "too small", "float", "one dimension", "too many tasks"])
def test_label_errors_are_named(labels, says):
    with pytest.raises(ValueError, match=says):
        biased_loss(branches((2, 5), (2, 3)), labels)


def test_a_model_of_one_branch_has_that_branchs_loss():
    (logits, _, _), labels = branches((6, 3)), torch.randint(0, 3, (6, 1))
    found = biased_loss((None, logits, None), labels)
    assert found.clinical is found.fusion is None
    close(found.total, branch_loss(logits, labels))
