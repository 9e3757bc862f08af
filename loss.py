"""The biased loss of PEMM (its Sec. 3.3, Eq. 1 to 3), and the focal and dice losses of CLNet.

    Eq. 1   L = (L_C + L_D + L_F) / 3                          equal
    Eq. 2   L = W_C L_C + W_D L_D + W_F L_F
    Eq. 3   L = W L_C + (0.5 - W) L_D + 0.5 L_F                biased: W_D > W_C, and W_F = W_C + W_D = 0.5

L_C, L_D and L_F are the losses of the clinical, dermoscopy and fusion branch: cross-entropy per task, unweighted, then
the mean over tasks (as in the authors' earlier public code). A label of -1 is unknown and left out. A task without a
known label in the batch is left out of the mean.

Shapes: B lesions, T tasks, n_t classes of task t. Run `python loss.py` for two lesions worked out.
"""
import torch
import torch.nn.functional as F

PAPER_W = 0.1  # paper, Sec. 4.1 and Table 7
GAMMA = 2.0  # of the focal loss (Lin et al. 2017, their best)

def focal(cross_entropy, gamma=GAMMA):
    """(1 - p)^gamma * -log p, p the probability of the truth: easy cases count less (Lin et al. 2017, Eq. 4)."""
    p = torch.exp(-cross_entropy)
    return (1 - p) ** gamma * cross_entropy

def branch_loss(logits, labels, gamma=0.0):
    """Logits T x (B, n_t), labels (B, T) int64 -> a scalar: cross-entropy (gamma 0) or focal loss, the mean over known
    labels, then over tasks."""
    if labels.shape != (len(logits[0]), len(logits)) or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, not int64 {(len(logits[0]), len(logits))}")
    known = (labels >= 0).sum(0)  # (T,): how many labels each task has
    sums = []
    for t, z in enumerate(logits):
        costs = F.cross_entropy(z, labels[:, t], ignore_index=-1, reduction="none")  # (B,), 0 where unknown
        if gamma > 0:
            costs = focal(costs, gamma)
        sums.append(costs.sum())
    means = torch.stack(sums) / known.clamp(min=1)
    return means.sum() / (known > 0).sum().clamp(min=1)  # a loss of no labels is 0

def weighted_loss(outputs, labels, weights):
    """Eq. 2. `outputs` is a dict from branch to logits, as the models return it, `weights` one from branch to weight.

    Returns the total and, for the log, a dict from branch to its own loss (detached). A branch alone counts fully.
    Raises ValueError if labels (B, T) int64, -1 for unknown, do not fit the logits.
    """
    parts = {branch: branch_loss(logits, labels) for branch, logits in outputs.items()}
    if len(parts) == 1:
        weights = dict.fromkeys(parts, 1)
    total = sum(weights[branch] * part for branch, part in parts.items())
    return total, {branch: part.detach() for branch, part in parts.items()}

def biased_loss(outputs, labels, w=PAPER_W):
    """Eq. 3."""
    return weighted_loss(outputs, labels, {"clinical": w, "dermoscopy": 0.5 - w, "fusion": 0.5})

def equal_loss(outputs, labels):
    """Eq. 1."""
    return weighted_loss(outputs, labels, {"clinical": 1 / 3, "dermoscopy": 1 / 3, "fusion": 1 / 3})

def dice_loss(logits, mask):
    """1 - Dice, mean over lesions: (B, 1, H, W) logits and masks of 0 and 1 (after Milletari et al. 2016, who square p
    and g below). Ours: 1 added above and below, so that an empty mask that is found empty costs nothing."""
    p = logits.sigmoid().flatten(1)
    g = mask.flatten(1)
    twice_shared = 2 * (p * g).sum(1) + 1
    both = p.sum(1) + g.sum(1) + 1
    return (1 - twice_shared / both).mean()

def clnet_loss(outputs, labels, mask):
    """CLNet, Sec. 3.1: focal for the classes, focal + dice for the mask (B, 1, H, W). Returns as weighted_loss."""
    parts = {}
    if "dermoscopy" in outputs:
        parts["dermoscopy"] = branch_loss(outputs["dermoscopy"], labels, GAMMA)
    if "mask" in outputs:
        z = outputs["mask"].float()
        pixels = F.binary_cross_entropy_with_logits(z, mask, reduction="none")
        parts["mask"] = focal(pixels).mean() + dice_loss(z, mask)
    return sum(parts.values()), {branch: part.detach() for branch, part in parts.items()}

def main():
    # Two lesions, two tasks of two classes; log(e^a / (e^a + e^b)) = -log(1 + e^(b - a)).
    labels = torch.tensor([[0, 1], [1, -1]])  # the second task of the second lesion is unknown
    outputs = {"clinical": [torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])],
               "dermoscopy": [torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])],
               "fusion": [torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]])]}
    total, parts = biased_loss(outputs, labels)
    print("L_C = (log 2 + log 2) / 2                            =", f"{parts['clinical']:.4f}")
    print("L_D = (log(1 + e^-2) + log(1 + e^-1)) / 2            =", f"{parts['dermoscopy']:.4f}")
    print("L_F = (log(1 + e^-3) + log(1 + e^-2)) / 2            =", f"{parts['fusion']:.4f}")
    print("Eq. 3, W = 0.1:  0.1 L_C + 0.4 L_D + 0.5 L_F         =", f"{total:.4f}")
    print("Eq. 1:           (L_C + L_D + L_F) / 3               =", f"{equal_loss(outputs, labels)[0]:.4f}")

if __name__ == "__main__":
    main()
