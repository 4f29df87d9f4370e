"""The detector of docs/detection.md, on random weights and on images that are made here."""

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import nemo
from examples import detection, detection_data, detr
from examples.detection_data import CLASSES, FLIPS, Target
from examples.detr_head import Head


def overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes (centre x, centre y, width, height), by hand."""
    sides, hull = [], []
    for axis in (0, 1):
        ends = [(box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2) for box in (a, b)]
        sides.append(max(0.0, min(ends[0][1], ends[1][1]) - max(ends[0][0], ends[1][0])))
        hull.append(max(ends[0][1], ends[1][1]) - min(ends[0][0], ends[1][0]))
    both = sides[0] * sides[1]
    either = a[2] * a[3] + b[2] * b[3] - both
    return both / either, both / either - (hull[0] * hull[1] - either) / (hull[0] * hull[1])


def cost(query: Tensor, box: list[float], label: int) -> float:
    found = (1 / (1 + (-query[:4]).exp())).tolist()
    chance = (query[4:].exp() / query[4:].exp().sum())[label]
    apart = sum(abs(x - y) for x, y in zip(found, box, strict=True))
    return float(-2 * chance + 5 * apart - 2 * overlap(found, box)[1])


@pytest.mark.parametrize("seed", range(5))
def test_objects_are_matched_at_the_least_cost_of_all_ways(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    output = torch.randn(5, 8, generator=random)
    target = Target(torch.rand(3, 4, generator=random) / 2 + 0.1, torch.tensor([2, 0, 0]))
    boxes, labels = target.boxes.tolist(), target.labels.tolist()
    ways = {
        way: sum(
            cost(output[q], box, kind) for q, box, kind in zip(way, boxes, labels, strict=True)
        )
        for way in itertools.permutations(range(5), 3)
    }
    queries, objects = detection.match(output, target)
    best = min(ways, key=lambda way: ways[way])
    assert dict(zip(objects.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))

    outputs, targets = output[None], [target]
    kinds = detection.query_labels(outputs, targets, [(queries, objects)])
    assert kinds[0].tolist() == [
        labels[best.index(query)] if query in best else 3 for query in range(5)
    ]
    loss = detection.detection_loss(outputs, targets, [(queries, objects)])
    weights = [0.2 if kind == 3 else 1.0 for kind in kinds[0].tolist()]
    logs = [-float(row[4:].log_softmax(0)[k]) for row, k in zip(output, kinds[0], strict=True)]
    wanted = sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
    for q, box in zip(best, boxes, strict=True):
        found = output[q, :4].sigmoid().tolist()
        apart = sum(abs(x - y) for x, y in zip(found, box, strict=True))
        wanted += (5 * apart + 2 * (1 - overlap(found, box)[1])) / 3
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_average_precision_of_a_case_that_was_counted_by_hand() -> None:
    """By score: nothing there, right, right, an object again; one of the three is never found."""
    square = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
    boxes = [torch.stack([square[0], square[0] + 0.01]), torch.stack([square[0] * 0, square[0]])]
    scores = [torch.tensor([0.8, 0.3]), torch.tensor([0.9, 0.5])]
    found = detection.average_precision(boxes, scores, [square[:1], square], 0.5)
    # precision 0, 1/2, 2/3, 2/4 at recall 0, 1/3, 2/3, 2/3; at 1/3 the later 2/3 counts
    assert found == pytest.approx(2 / 3 * 2 / 3)


@pytest.mark.parametrize(("iou", "right"), [(0.6, 1.0), (0.65, 0.0)])
def test_average_precision_counts_boxes_that_overlap_enough(iou: float, right: float) -> None:
    """Moved by .05 both ways, a square of .4 has an IoU of .35 ** 2 / (2 * .4 ** 2 - .35 ** 2)."""
    square, nothing = torch.tensor([[0.0, 0.0, 0.4, 0.4]]), torch.zeros(0, 4)
    boxes, scores = [square.repeat(2, 1), nothing], [torch.tensor([0.2, 0.1]), torch.zeros(0)]
    found = detection.average_precision(boxes, scores, [square + 0.05, nothing], iou)
    assert found == pytest.approx(right)


def test_precisions_are_of_the_classes_columns_and_thresholds() -> None:
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2]])
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0]])
    wanted = boxes.clone()
    wanted[1, 2] = 0.15  # an IoU of .75
    target = Target(wanted, torch.tensor([0, 1]))
    found = detection.precisions(torch.cat([boxes.logit(), logits], 1)[None], [target], [0, 1])
    assert found[0] == [1.0] * 10
    assert found[1][:5] == [1.0] * 5
    assert found[1][6:] == [0.0] * 4
    swapped = torch.cat([boxes.logit(), logits[:, [1, 0, 2, 3]]], 1)[None]
    assert detection.precisions(swapped, [target], [1, 0])[0] == [1.0] * 10


def images(root: Path, names: list[str]) -> None:
    """One bright square a picture, of each class in turn, in BCCD's folders."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, name in enumerate(names):
        x, y = int(random.integers(0, 520)), int(random.integers(0, 360))
        pixels = random.integers(0, 60, (480, 640, 3), dtype=np.uint8)
        pixels[y : y + 100, x : x + 120] = 255
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 120}</xmax><ymax>{y + 100}</ymax>"
        empty = box.replace(f"<xmax>{x + 120}<", f"<xmax>{x}<")
        item = f"<object><name>{CLASSES[i % 3]}</name><bndbox>{box}</bndbox></object>"
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><size><width>640</width><height>480</height></size>{item}"
            f"{item.replace(box, empty)}</annotation>"
        )
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:6]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[6:]))


class Eyes(nn.Module):
    """The mean of each 16 x 16 pixels, and two channels more."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 16) * torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1)


def test_boxes_turn_with_the_features(tmp_path: Path) -> None:
    images(tmp_path / "BCCD", [f"image{i}" for i in range(9)])
    split = detection_data.prepare(tmp_path / "BCCD", Eyes())["train"]
    assert split.features.shape == (4, 6, 3, 15, 20)
    for features, flip in zip(split.features.float(), FLIPS, strict=True):
        for seen, target in zip(features[:, 0], split.targets, strict=True):
            (box,) = target.flipped(flip).boxes.tolist()
            bright = (seen > 0).nonzero() + 0.5
            y, x = (bright.mean(0) / torch.tensor([15, 20])).tolist()
            assert abs(x - box[0]) < 1 / 20
            assert abs(y - box[1]) < 1 / 15
            assert box[2:] == pytest.approx([120 / 640, 100 / 480])
    shuffled = [t for _, part in split.batches(4, seed=1) for t in part]
    assert sorted(int(t.labels) for t in shuffled) == [0, 0, 1, 1, 2, 2]


def made(pool: bool) -> nemo.Modular:
    torch.manual_seed(0)
    head = Head(3, 15, 20, len(CLASSES)).eval()
    modular = detr.modular_of(head, "query" if pool else "image", torch.randn(2, 3, 15, 20))
    for parameter in modular.generators.parameters():
        nn.init.normal_(parameter, std=0.3)
    return modular


def test_each_query_has_masks_and_the_images_rows_are_its_classes() -> None:
    x, labels = torch.randn(2, 3, 15, 20), torch.full((2, 32), 3)
    labels[0, [5, 9]], labels[1, 7] = torch.tensor([1, 2]), 1
    modular = made(pool=True)
    _, masks = modular(x)
    shapes = {layer: tuple(mask.shape) for layer, mask in masks.items()}
    assert shapes == {layer: (2, 32, neurons) for layer, neurons in modular.layers.items()}
    assert {"layers.1.q", "layers.2.down", "hidden"} <= set(masks)
    rows, classes = detr.labelled("query", masks, labels)
    assert classes.tolist() == [1, 2, 1]
    assert torch.equal(rows["hidden"], masks["hidden"][[0, 0, 1], [5, 9, 7]])
    _, whole = made(pool=False)(x)
    rows, classes = detr.labelled("image", whole, labels)
    assert classes.tolist() == [1, 2, 1]
    assert torch.equal(rows["hidden"], whole["hidden"][[0, 0, 1]])


def test_the_module_of_a_class_gives_the_models_boxes_and_its_logits() -> None:
    modular, x = made(pool=True), torch.randn(3, 3, 15, 20)
    on = {layer: torch.rand(3, n) > 0.5 for layer, n in modular.layers.items()}
    masks, columns = nemo.ClassMasks(on, {}).select([1]), [0, 1, 2, 3, 5, 7]
    module, head = nemo.decompose(modular, masks, columns), modular.model
    for layer, mask in on.items():  # the masks again, by hooks of our own
        at = head.get_submodule(layer)
        at.register_forward_hook(lambda m, args, y, mask=mask[1]: y * mask)
    torch.testing.assert_close(module(x), head(x)[..., columns])
    assert module.report["parameters"] < module.report["parent_parameters"]


@pytest.fixture
def denormals() -> Iterator[None]:
    """The command sets this for its process, which is that of the other tests here."""
    yield
    torch.set_flush_denormal(False)


def test_a_batch_has_at_most_16_rows_of_a_class() -> None:
    classes = torch.tensor([0] * 40 + [1] * 3 + [2] * 16)
    masks = {"layer": torch.arange(59.0)[:, None]}
    rows, chosen = detr.balanced(masks, classes)
    assert chosen.bincount().tolist() == [16, 3, 16]
    assert len(set(rows["layer"].flatten().tolist())) == 35
    assert torch.equal(classes[rows["layer"].flatten().long()], chosen)


def test_a_class_keeps_what_is_on_in_nine_of_ten_of_its_rows() -> None:
    classes = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    rows = torch.zeros(30, 3, dtype=torch.bool)
    rows[:9, 0] = rows[10:18, 1] = rows[:, 2] = True
    masks = detr.class_masks({"layer": rows}, classes)
    assert masks["layer"].tolist() == [[True, False, True]] + [[False, False, True]] * 2


class Watched(detection_data.Split):
    """Keeps in which order its images were asked for: None, or the seed of a training's epoch."""

    def batches(self, size: int, seed: int | None = None) -> Iterator[tuple[Tensor, list[Target]]]:
        self.__dict__.setdefault("asked", []).append(seed)
        return super().batches(size, seed)


def watched(tmp_path: Path) -> dict[str, Watched]:
    images(tmp_path / "BCCD", [f"image{i}" for i in range(9)])
    found = detection_data.prepare(tmp_path / "BCCD", Eyes())
    return {name: Watched(split.features, split.targets) for name, split in found.items()}


def test_no_test_image_is_learned_from_and_the_figures_are_of_all(tmp_path: Path) -> None:
    data = watched(tmp_path)
    row = detr.run(detr.Method("query", 0.5), data, 3, 1, tmp_path)
    assert data["test"].asked == [None] * 3  # the whole model, its module as cut and fine-tuned
    assert [seed for seed in data["train"].asked if seed is not None] == [3001]
    module = nemo.load(tmp_path / "query-0.5-white-cells").eval()
    with torch.no_grad():
        out = module(data["test"].features[0].float())
    boxes = detection.corners(out[..., :4].sigmoid())
    true = [detection.corners(t.boxes[t.labels == 1]) for t in data["test"].targets]
    score = out[..., 4:].softmax(-1)[..., 0]
    found = detection.average_precision(list(boxes), list(score), true, 0.5)
    assert row["module_ap50"] == pytest.approx(100 * found)


def test_a_module_of_white_cells_is_fine_tuned_on_their_boxes(tmp_path: Path, monkeypatch) -> None:
    trained = []
    real = detr.train

    def spy(model: nn.Module, split: detection_data.Split, *rest: object) -> None:
        trained.append([one.labels.tolist() for one in split.targets])
        real(model, split, *rest)

    monkeypatch.setattr(detr, "train", spy)
    detr.run(detr.Method("image", 0.5), watched(tmp_path), 0, 1, tmp_path)
    assert trained == [[[0], [1], [2], [0], [1], [2]], [[], [0], [], [], [0], []]]


def test_the_loss_on_masks_is_learned_from(tmp_path: Path, monkeypatch) -> None:
    split = watched(tmp_path)["train"]
    trained = []
    for loss in (nemo.contrastive_loss, lambda masks, labels, tau: torch.zeros(())):
        monkeypatch.setattr(nemo, "contrastive_loss", loss)
        modular = made(pool=True)
        torch.manual_seed(0)  # of dropout and of the rows
        detr.train(modular, split, 1, 1e-3, 0, detr.Method("query", 0.5))
        trained.append(modular.generators["hidden"].squeeze.weight)
    assert not torch.equal(*trained)


XML = "Annotations/image1.xml"
DAMAGE = [
    (XML, "<xmin>", "<left>", "no bndbox/xmin; accepted: Pascal VOC's XML, with objects called"),
    (XML, "</annotation>", "", f"{XML}: no element found"),
    (XML, "<width>640<", "<width>0<", f"{XML}: a size of 0 x 480; accepted"),
    (XML, "WBC", "leucocyte", f"{XML}: an object called 'leucocyte'; accepted: Pascal VOC's XML"),
    (XML, "<ymax>", "<ymax>about ", f"{XML}: could not convert string to float"),
    ("ImageSets/Main/test.txt", "image7", "", "test.txt: 2 images without WBC; accepted: boxes of"),
    ("ImageSets/Main/test.txt", "image7", "none", "Annotations/none.xml: [Errno 2] No such file"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), DAMAGE)
def test_damaged_data_are_one_clear_line(
    tmp_path: Path, name: str, old: str, new: str, said: str
) -> None:
    images(tmp_path, [f"image{i}" for i in range(9)])
    file = tmp_path / name
    text = file.read_text()
    assert old in text
    damaged = text.replace(old, new)
    file.write_text(damaged.replace("</xmin>", "</left>") if old == "<xmin>" else damaged)
    with pytest.raises(click.ClickException) as failed:
        detection_data.prepare(tmp_path, Eyes())
    assert said in failed.value.message
    assert "\n" not in failed.value.message


def test_a_damaged_image_or_tar_is_one_clear_line(tmp_path: Path) -> None:
    images(tmp_path, [f"image{i}" for i in range(9)])
    (tmp_path / "JPEGImages/image2.jpg").write_bytes(b"no")
    with pytest.raises(click.ClickException, match=r"JPEGImages/image2\.jpg: .*; accepted: JPEG"):
        detection_data.prepare(tmp_path, Eyes())
    (tmp_path / "x.tar").write_bytes(b"no" * 999)
    with (
        pytest.raises(click.ClickException, match=r"x\.tar: .*; accepted: BCCD's folder, or a"),
        detection_data.opened(tmp_path / "x.tar"),
    ):
        pass


def test_a_work_folder_is_for_one_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(detection_data, "backbone", Eyes)
    images(tmp_path / "a", [f"image{i}" for i in range(9)])
    images(tmp_path / "b", [f"other{i}" for i in range(9)])
    work = tmp_path / "work"
    with pytest.raises(click.UsageError, match=r"no --data, and no .*features\.safetensors of an"):
        detection_data.stored(work, None)
    first = detection_data.stored(work, tmp_path / "a")["train"].features
    for again in (tmp_path / "a", None):
        assert torch.equal(detection_data.stored(work, again)["train"].features, first)
    with pytest.raises(click.UsageError, match=r"is of other data; accepted: another --work"):
        detection_data.stored(work, tmp_path / "b")
    (work / "features.safetensors").write_bytes(b"half")
    with pytest.raises(click.UsageError, match=r"features\.safetensors: damaged .*; delete it"):
        detection_data.stored(work, None)


def test_a_training_that_diverged_has_no_figures() -> None:
    head = Head(3, 15, 20, len(CLASSES))
    nn.init.constant_(head.kind.bias, float("nan"))
    split = detection_data.Split(torch.zeros(1, 2, 3, 15, 20), [])
    split.targets = [Target(torch.rand(1, 4), torch.tensor([0]))] * 2
    with pytest.raises(click.ClickException, match="the training diverged"):
        detr.measure(head, split, range(3))


@pytest.mark.usefixtures("denormals")
def test_the_commands_train_go_on_and_write_the_report(tmp_path: Path, monkeypatch) -> None:
    images(tmp_path / "BCCD", [f"image{i}" for i in range(9)])
    with tarfile.open(tmp_path / "bccd.tar", "w") as archive:
        archive.add(tmp_path / "BCCD", "BCCD")
    monkeypatch.setattr(detection_data, "backbone", Eyes)
    methods = [detr.Method("none"), detr.Method("image", 1.0), detr.Method("query", 0.5)]
    monkeypatch.setattr(detr, "METHODS", methods)
    work = ["--work", str(tmp_path / "work")]
    command = ["--data", str(tmp_path / "bccd.tar"), "--seed", "0", "--epochs", "1", *work]
    ran = CliRunner().invoke(detr.main, command)
    assert ran.exit_code == 0, ran.output
    module = nemo.load(tmp_path / "work/seed-0/query-0.5-white-cells")
    assert module(torch.randn(2, 3, 15, 20)).shape == (2, 32, 6)
    (tmp_path / "work/seed-0/standard.json").unlink()
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "work/seed-0").glob("*.json")}
    (tmp_path / "detection.md").write_text(
        "Above.\n<!-- tables -->\nold\n<!-- /tables -->\nBelow.\n"
    )
    again = ["--seed", "0", "--epochs", "1", *work]
    ran = CliRunner().invoke(detr.main, [*again, "--report", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "work/seed-0").glob("*.json")}
    assert after.items() >= before.items()
    assert "standard.json" in after
    page, rows = (tmp_path / "detection.md").read_text(), (tmp_path / "detection.csv").read_text()
    assert page.startswith("Above.\n<!-- tables -->\n")
    assert page.endswith("<!-- /tables -->\nBelow.\n")
    assert "old" not in page
    found = [line.split(",")[:3] for line in rows.splitlines()]
    assert found[:2] == [["seed", "masks", "alpha"], ["0", "none", "0.0"]]
    assert found[2:] == [["0", "image", "1.0"], ["0", "query", "0.5"]]
    ran = CliRunner().invoke(detr.main, ["--seed", "0", "--epochs", "2", *work])
    assert ran.exit_code == 2
    assert "standard.json is of 1 epochs; accepted: --epochs 1, or another --work" in ran.output
    (tmp_path / "work/seed-1").mkdir()
    ran = CliRunner().invoke(detr.main, ["--report", "--out", str(tmp_path), *work])
    assert ran.exit_code == 2
    assert "seed-1/standard.json; run --seed first" in ran.output
    for file in (tmp_path / "work/seed-0").glob("*.json"):
        other = file.read_text().replace('"epochs": 1', '"epochs": 2')
        (tmp_path / "work/seed-1" / file.name).write_text(other)
    ran = CliRunner().invoke(detr.main, ["--report", "--out", str(tmp_path), *work])
    assert ran.exit_code == 2
    assert "results of {1, 2} epochs; accepted: one number of them" in ran.output


def test_a_tar_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", arcname="../ImageSets/a.txt")
    with (
        pytest.raises(click.ClickException, match=r"'\.\./ImageSets/a\.txt' would lie outside"),
        detection_data.opened(tmp_path / "odd.tar"),
    ):
        pass
