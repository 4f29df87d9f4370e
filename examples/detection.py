"""Detection as a set: matching, its loss and average precision, for examples/detr.py.

A prediction is (B, Q, 4 + C + 1): the logits of a box's centre and size as parts of the image, then
those of C classes and of "no object". Boxes are centre x, centre y, width and height.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou, generalized_box_iou_loss

from examples.detection_data import Target

IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # of COCO's AP
COSTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}  # DETR's weights
NONE_WEIGHT = 0.2  # of "no object" in the cross-entropy: most queries have none
Match = tuple[Tensor, Tensor]


def corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


@torch.no_grad()
def match(output: Tensor, target: Target) -> Match:
    """(queries, objects) of one image (Q, 4 + C + 1): a query for each object, at least cost."""
    boxes, chance = output[:, :4].sigmoid(), output[:, 4:].softmax(-1)
    cost = -COSTS["class"] * chance[:, target.labels]
    cost += COSTS["l1"] * torch.cdist(boxes, target.boxes, p=1)
    cost -= COSTS["giou"] * generalized_box_iou(corners(boxes), corners(target.boxes))
    queries, objects = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(queries), torch.from_numpy(objects)


def query_labels(outputs: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> Tensor:
    """(B, Q): the class of each query's object; C where it has none."""
    labels = torch.full(outputs.shape[:2], outputs.shape[2] - 5)
    for row, target, (queries, objects) in zip(labels, targets, matches, strict=True):
        row[queries] = target.labels[objects]
    return labels


def detection_loss(outputs: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> Tensor:
    """DETR's loss: cross-entropy of all queries, and L1 and GIoU of the boxes that are matched."""
    labels = query_labels(outputs, targets, matches)
    weights = torch.ones(outputs.shape[2] - 4)
    weights[-1] = NONE_WEIGHT
    loss = F.cross_entropy(outputs[..., 4:].flatten(0, 1), labels.flatten(), weights)
    pairs = list(zip(outputs, targets, matches, strict=True))
    boxes = torch.cat([output[queries, :4] for output, _, (queries, _) in pairs]).sigmoid()
    wanted = torch.cat([target.boxes[objects] for _, target, (_, objects) in pairs])
    l1 = COSTS["l1"] * (boxes - wanted).abs().sum()
    giou = COSTS["giou"] * generalized_box_iou_loss(
        corners(boxes), corners(wanted), reduction="sum"
    )
    return loss + (l1 + giou) / max(1, len(boxes))


def average_precision(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], wanted: Sequence[Tensor], iou: float
) -> float:
    """Area under the precision (made to fall) over recall of one class.

    Args:
        boxes, scores: of each image, corners (n, 4) and (n,).
        wanted: of each image, corners (m, 4). Best scores first, each takes the free one with which
            it overlaps most; it is right if their IoU is at least `iou`.
    """
    right: list[tuple[float, bool]] = []
    for found, score, true in zip(boxes, scores, wanted, strict=True):
        overlaps = box_iou(found, true)
        for i in score.argsort(descending=True, stable=True).tolist():
            best = int(overlaps[i].argmax()) if len(true) else -1
            hit = best >= 0 and bool(overlaps[i, best] >= iou)
            if hit:
                overlaps[:, best] = -1
            right.append((float(score[i]), hit))
    right.sort(key=lambda one: -one[0])
    hits = np.array([hit for _, hit in right]).cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    gained = np.diff(hits, prepend=0)
    return float((precision * gained).sum() / sum(map(len, wanted)))


def precisions(
    outputs: Tensor, targets: Sequence[Target], classes: Sequence[int]
) -> dict[int, list[float]]:
    """{class: AP at each of IOUS}; the classes in the order of the output's columns."""
    chance, boxes = outputs[..., 4:].softmax(-1), corners(outputs[..., :4].sigmoid())
    found = {}
    for column, label in enumerate(classes):
        true = [corners(target.boxes[target.labels == label]) for target in targets]
        scores = list(chance[..., column])
        found[label] = [average_precision(list(boxes), scores, true, iou) for iou in IOUS]
    return found
