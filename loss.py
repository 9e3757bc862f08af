"""The biased loss of PEMM (Sec. 3.3), which trusts the dermoscopy photo more than the clinical.

    Eq. 1   L = (L_C + L_D + L_F) / 3                        equal
    Eq. 2   L = W_C L_C + W_D L_D + W_F L_F                  any weights
    Eq. 3   L = W L_C + (0.5 - W) L_D + 0.5 L_F              biased; W = 0.1 in the paper

L_C, L_D and L_F are the losses of the three branches: clinical, dermoscopy and fusion. Each is

    mean over tasks ( mean over lesions ( cross-entropy, without class weights ) )

The paper does not say how tasks are combined. FusionM4Net, its authors' earlier code, averages.

A label of -1 is unknown and costs nothing. A task without a known label in the batch is left out of
the mean over tasks. So one label alone in its task weighs as much as a whole batch of another task.

Shapes: B lesions, T tasks, n_t classes of task t. `python loss.py` works two lesions out.
The method ends with `biased_loss`. CLNet's loss follows, then the choice by train.py's flags.
"""

import torch
import torch.nn.functional as F

PAPER_W = 0.1  # paper, Sec. 4.1 and Table 7
UNKNOWN = -1  # the label that means: not known


def cross_entropies(logits, labels):
    """The cost of each lesion in each task: T logits (B, n_t), labels (B, T) int64 -> (B, T).

    Here a cost belongs to one lesion and task; a loss is a mean of costs. Unknown labels cost 0.
    Logits in bfloat16 become float32 first: bfloat16 has about three digits, and the small costs of
    easy lesions would lose their gradients.
    """
    T = len(logits)
    B = len(logits[0])  # of the first task, as of all
    if labels.shape != (B, T) or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, not int64 {(B, T)}")
    costs = []
    for t in range(T):
        z = logits[t].to(torch.promote_types(logits[t].dtype, torch.float32))  # or float64
        cost = F.cross_entropy(z, labels[:, t], ignore_index=UNKNOWN, reduction="none")
        costs.append(cost)  # (B,)
    return torch.stack(costs, dim=1)


def mean_over_known(costs, labels):
    """The mean over the lesions whose label is known, task by task, then the mean over tasks.

    costs (B, T) and labels (B, T) -> a scalar, 0 if no label is known.
    """
    is_known = labels != UNKNOWN
    costs = torch.where(is_known, costs, 0)  # those of cross_entropies are 0 there already
    num_known = is_known.sum(dim=0)  # (T,)
    task_losses = costs.sum(dim=0) / num_known.clamp(min=1)  # (T,), 0 for a task without labels
    num_tasks = (num_known > 0).sum()
    return task_losses.sum() / num_tasks.clamp(min=1)


def branch_loss(logits, labels):
    """L_C, L_D or L_F, the loss of one branch: T logits (B, n_t), labels (B, T) -> a scalar."""
    return mean_over_known(cross_entropies(logits, labels), labels)


def weighted_loss(outputs, labels, weights):
    """Eq. 2.

    outputs: branch -> T logits (B, n_t), as a network of model.py returns it (but not CLNet)
    labels:  (B, T) int64, -1 for unknown
    weights: branch -> its weight
    Returns the total, and the loss of each branch for the log (detached from the graph).
    """
    if outputs.keys() != weights.keys():
        raise ValueError(f"weights for {list(weights)}, but the branches are {list(outputs)}")
    total = 0
    branch_losses = {}
    for branch, logits in outputs.items():
        loss = branch_loss(logits, labels)
        total = total + weights[branch] * loss
        branch_losses[branch] = loss.detach()
    return total, branch_losses


def equal_loss(outputs, labels):
    """Eq. 1: the mean over the branches, however many there are."""
    weight = 1 / len(outputs)
    weights = {branch: weight for branch in outputs}
    return weighted_loss(outputs, labels, weights)


def biased_loss(outputs, labels, w=PAPER_W):
    """Eq. 3, w from 0 to 0.5. Arguments and result are those of weighted_loss.

    A network with one branch has nothing to balance: its loss is the branch's, whatever w is.
    """
    if len(outputs) == 1:
        return equal_loss(outputs, labels)
    weights = {"clinical": w, "dermoscopy": 0.5 - w, "fusion": 0.5}
    return weighted_loss(outputs, labels, weights)


# The method ends here.

# ------------------------------------------------------------------------------------- CLNet

GAMMA = 2.0  # not in the paper: the best value in Lin et al. 2017


def focal(costs):
    """(1 - p)^gamma * -log p, p the probability of the truth: easy cases count less.

    Lin et al. 2017, Eq. 4. Costs of any shape, cross-entropies -log p -> costs of the same shape.
    """
    p = torch.exp(-costs)
    return (1 - p) ** GAMMA * costs


def dice_loss(logits, mask):
    """1 - Dice, the mean over lesions. logits and mask (B, 1, H, W) float, the mask of 0 and 1."""
    p = logits.sigmoid().flatten(1)  # (B, H * W)
    mask = mask.flatten(1)
    intersection = (p * mask).sum(dim=1)  # (B,)
    areas = p.sum(dim=1) + mask.sum(dim=1)
    # Not in the paper: 1 is added, so that an empty mask and an empty answer do not give 0 / 0.
    # Such an answer costs next to nothing once the sum of p is far below 1.
    dice = (2 * intersection + 1) / (areas + 1)
    return (1 - dice).mean()


def clnet_loss(outputs, batch):
    """CLNet, Sec. 3.1: the sum of a focal loss for the classes and a focal and dice loss for the
    mask.

    outputs: "dermoscopy" -> T logits of the classes, "mask" -> logits (B, 1, H, W); one may be
    absent
    batch:   its "labels" (B, T) and its "mask" (B, 1, H, W) are read. Every lesion has a mask
    Returns what weighted_loss returns.
    """
    losses = {}
    if "dermoscopy" in outputs:
        costs = cross_entropies(outputs["dermoscopy"], batch["labels"])
        losses["dermoscopy"] = mean_over_known(focal(costs), batch["labels"])
    if "mask" in outputs:
        logits = outputs["mask"].float()  # sums over a whole mask would be rough in bfloat16
        mask = batch["mask"]
        costs = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        losses["mask"] = focal(costs).mean() + dice_loss(logits, mask)
    branch_losses = {branch: loss.detach() for branch, loss in losses.items()}
    return sum(losses.values()), branch_losses


# -------------------------------------------------------------------------------- the choice


def make_criterion(flags):
    """The loss that train.py's flags ask for: a function of a network's outputs and the batch.

    flags: a dict in which "model", "loss" and "w" are read; of CLNet only "model".
    """

    def biased(outputs, batch):
        return biased_loss(outputs, batch["labels"], flags["w"])

    def equal(outputs, batch):
        return equal_loss(outputs, batch["labels"])

    if flags["model"] == "clnet":
        return clnet_loss
    if flags["loss"] == "biased":
        return biased
    if flags["loss"] == "equal":
        return equal
    raise ValueError(f"unknown loss {flags['loss']!r}")


def main():
    # Two lesions, two tasks of two classes. The cost is log(1 + e^-a) where the true class's logit
    # is a above the other's. The second task of the second lesion is unknown: its 5 costs nothing.
    labels = torch.tensor([[0, 1], [1, UNKNOWN]])  # a row for each lesion
    outputs = {
        "clinical": [
            torch.tensor([[0.0, 0.0], [0.0, 0.0]]),  # a = 0 and 0
            torch.tensor([[0.0, 0.0], [0.0, 0.0]]),  # a = 0
        ],
        "dermoscopy": [
            torch.tensor([[2.0, 0.0], [0.0, 2.0]]),  # a = 2 and 2
            torch.tensor([[0.0, 1.0], [5.0, 0.0]]),  # a = 1
        ],
        "fusion": [
            torch.tensor([[3.0, 0.0], [0.0, 3.0]]),  # a = 3 and 3
            torch.tensor([[0.0, 2.0], [5.0, 0.0]]),  # a = 2
        ],
    }
    biased_total, losses = biased_loss(outputs, labels)
    equal_total, _ = equal_loss(outputs, labels)
    print(f"L_C = (log 2 + log 2) / 2                       = {losses['clinical']:.4f}")
    print(f"L_D = (log(1 + e^-2) + log(1 + e^-1)) / 2       = {losses['dermoscopy']:.4f}")
    print(f"L_F = (log(1 + e^-3) + log(1 + e^-2)) / 2       = {losses['fusion']:.4f}")
    print(f"Eq. 3, W = 0.1:  0.1 L_C + 0.4 L_D + 0.5 L_F    = {biased_total:.4f}")
    print(f"Eq. 1:           (L_C + L_D + L_F) / 3          = {equal_total:.4f}")


if __name__ == "__main__":
    main()
