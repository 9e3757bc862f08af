"""The biased loss (Sec. 3.3, Eq. 1 to 3 of the PEMM paper).

    Eq. 1   L = (L_C + L_D + L_F) / 3                          equal
    Eq. 2   L = W_C L_C + W_D L_D + W_F L_F
    Eq. 3   L = W L_C + (0.5 - W) L_D + 0.5 L_F                biased: W_D > W_C, and W_F = W_C + W_D = 0.5

L_C, L_D and L_F are the losses of the clinical, dermoscopy and fusion branch: cross-entropy per task, unweighted, then the
mean over tasks (as in the authors' earlier public code). A label of -1 is unknown and left out; a task of which no label of
the batch is known is left out of the mean over tasks.

Shapes: B pairs, T tasks, n_t classes of task t.

Run `python loss.py` for two lesions worked out.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

PAPER_W = 0.1  # paper, Sec. 4.1 and Table 7


class Loss(NamedTuple):
    """The total to minimise and, for the log, its parts (detached); None for a branch that the model does not have."""
    total: torch.Tensor
    clinical: torch.Tensor | None
    dermoscopy: torch.Tensor | None
    fusion: torch.Tensor | None


def branch_loss(logits, labels):
    """Mean over tasks of the mean cross-entropy over the known labels: T x (B, n_t) and (B, T) -> a scalar."""
    if labels.shape != (len(logits[0]), len(logits)) or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; {len(logits)} tasks and {len(logits[0])} pairs "
                         f"need int64 ({len(logits[0])}, {len(logits)})")
    if labels.device.type == "cpu":  # on a GPU the look itself would stall the loop; data.py has checked every label
        for task, (z, y) in enumerate(zip(logits, labels.T)):
            if y.max() >= z.shape[1] or y.min() < -1:
                raise ValueError(f"task {task} has {z.shape[1]} classes, but labels from {y.min()} to {y.max()}")
    sums = torch.stack([F.cross_entropy(z, y, ignore_index=-1, reduction="sum") for z, y in zip(logits, labels.T)])
    known = (labels >= 0).sum(0)  # (T,)
    return (sums / known.clamp(min=1)).sum() / (known > 0).sum().clamp(min=1)


def weighted_loss(outputs, labels, w_c, w_d, w_f):
    """Eq. 2. A model of one modality has one branch, whose loss is then the whole loss."""
    parts = [None if branch is None else branch_loss(branch, labels) for branch in outputs]
    present = [part for part in parts if part is not None]
    total = present[0] if len(present) == 1 else sum(w * part for w, part in zip((w_c, w_d, w_f), parts, strict=True))
    return Loss(total, *(part if part is None else part.detach() for part in parts))


def biased_loss(outputs, labels, w=PAPER_W):
    """Eq. 3. `outputs` as PEMM returns them, labels (B, T) int64 with -1 for unknown; returns a Loss."""
    return weighted_loss(outputs, labels, w, 0.5 - w, 0.5)


def equal_loss(outputs, labels):
    """Eq. 1."""
    return weighted_loss(outputs, labels, 1 / 3, 1 / 3, 1 / 3)


def main():
    # Two lesions, two tasks of two classes; log(e^a / (e^a + e^b)) = -log(1 + e^(b - a)).
    labels = torch.tensor([[0, 1], [1, -1]])  # the second task of the second lesion is unknown
    clinical = [torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])]
    dermoscopy = [torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])]
    fusion = [torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]])]
    loss = biased_loss((clinical, dermoscopy, fusion), labels)
    print("L_C = (log 2 + log 2) / 2                            =", f"{loss.clinical:.4f}")
    print("L_D = (log(1 + e^-2) + log(1 + e^-1)) / 2            =", f"{loss.dermoscopy:.4f}")
    print("L_F = (log(1 + e^-3) + log(1 + e^-2)) / 2            =", f"{loss.fusion:.4f}")
    print("Eq. 3, W = 0.1:  0.1 L_C + 0.4 L_D + 0.5 L_F         =", f"{loss.total:.4f}")
    print("Eq. 1:           (L_C + L_D + L_F) / 3               =",
          f"{equal_loss((clinical, dermoscopy, fusion), labels).total:.4f}")


if __name__ == "__main__":
    main()
