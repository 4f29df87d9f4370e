"""The examples on sequences, on texts that are made here."""

import csv
import math
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from click import ClickException
from click.testing import CliRunner

import nemo
from examples import gpt, text_classifier
from examples.texts import batches, read

WORDS = {"ada": b"begin if x then y := 1; end if; ", "bash": b"for f in *; do echo $f; done\n"}
SIZES = {"train": 60, "test": 20}  # times that the words are in a file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for split, times in SIZES.items():
        for language, words in WORDS.items():
            folder = root / split / language
            folder.mkdir(parents=True)
            (folder / "b.txt").write_bytes(words * times)
            (folder / "a.txt").write_bytes(b"first of " + split.encode() + b" " + words)
    return root


def run(command: object, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_files_of_a_language_are_read_in_order(data: Path) -> None:
    for (split, times), texts in zip(SIZES.items(), read(data), strict=True):
        assert list(texts) == ["ada", "bash"]
        first = f"first of {split} ".encode() + WORDS["ada"]
        assert bytes(texts["ada"].tolist()) == first + b"\n" + WORDS["ada"] * times + b"\n"


def test_data_without_languages_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "train/ada").mkdir(parents=True)
    (tmp_path / "train/ada/a.txt").write_bytes(b"long" * 99)
    (tmp_path / "train/README.md").write_bytes(b"long" * 99)  # belongs to no language
    for command in (gpt.main, text_classifier.main):
        arguments = ["train"] if command is gpt.main else []
        result = CliRunner().invoke(command, [*arguments, "--data", str(tmp_path)])
        assert result.exit_code == 1
        assert result.output.startswith(
            f"Error: {tmp_path}: train/ has ada, test/ nothing; accepted: the same two languages"
        )


def test_a_tar_is_read_as_its_folder(data: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(data, ".")
    for a, b in zip(read(data), read(tmp_path / "texts.tar"), strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    whole = (tmp_path / "texts.tar").read_bytes()
    for content in (b"text", b"", whole[:1100]):
        (tmp_path / "not.tar").write_bytes(content)
        with pytest.raises(ClickException, match=r"not\.tar is no \.tar, or a part of one; accep"):
            read(tmp_path / "not.tar")


def test_a_report_of_nothing_says_what_is_missing(data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(gpt.main, ["report", "--data", str(data), "--work", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no seed-*.csv; accepted: data and options that `train` was given" in result.output


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (gpt.main, ["train", "--alpha", "nan"], "--alpha: nan; accepted: a number, 0 or above"),
        (gpt.main, ["train", "--alpha", "-1"], "--alpha: -1.0; accepted: a number, 0 or above"),
        (gpt.main, ["train", "--width", "18"], "--width: 18; accepted: multiples of 4"),
        (gpt.main, ["train", "--seed", "-1"], "-1 is not in the range"),
        (text_classifier.main, ["--seeds", "0"], "0 is not in the range x>=1"),
    ],
)
def test_odd_options_are_refused_before_anything_is_trained(
    data: Path, tmp_path: Path, command: object, options: list[str], said: str
) -> None:
    result = CliRunner().invoke(command, [*options, "--data", str(data)])
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_other_texts_have_another_folder(tmp_path: Path) -> None:
    size, a, b = gpt.Size(16, 2, 20, 1.0), torch.zeros(300).byte(), torch.ones(300).byte()
    texts = [
        {"ada": a, "bash": b},
        {"ada": a, "zsh": b},
        {"ada": torch.cat([a, b[:1]]), "z": b[1:]},
    ]
    assert len({size.folder(tmp_path, each) for each in texts}) == 3


@pytest.mark.parametrize("near", [1, 30_000, 90_000, 10**9])
def test_the_dense_gpt_has_the_nearest_width(near: int) -> None:
    counts = {w: gpt.parameters(gpt.GPT(w, 2)) for w in (8, 12, 36, 40, 44, 68, 72, 76, 80, 512)}
    found = gpt.parameters(gpt.as_large(near, 2))
    assert abs(found - near) <= min(abs(count - near) for count in counts.values())


def test_bits_per_byte_counts_the_bytes_after_the_first_64() -> None:
    torch.manual_seed(0)
    net = gpt.GPT(16, 2).eval()
    text = torch.randint(0, 256, (3 * 256 + 100,), dtype=torch.uint8)
    bits = []
    for start in (0, 256, 512):
        x = text[start : start + 256].long()
        chances = torch.softmax(net(x[None])[0].double(), 1)
        bits += [-math.log2(chances[i - 1, x[i]].item()) for i in range(64, 256)]
    assert len(bits) == 3 * 192
    assert gpt.bits_per_byte(net, text) == pytest.approx(sum(bits) / len(bits), rel=1e-5)


def test_masks_and_early_logits_do_not_know_later_bytes() -> None:
    torch.manual_seed(0)
    modular = gpt.modular(gpt.GPT(16, 2)).eval()
    for parameter in modular.generators.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randint(0, 256, (2, 256))
    other = x.clone()
    other[:, 64:] = torch.randint(0, 256, (2, 192))
    (a, masks), (b, theirs) = modular(x), modular(other)
    assert all(torch.equal(mask, theirs[layer]) for layer, mask in masks.items())
    assert not all(torch.equal(mask[0], mask[1]) for mask in masks.values())
    torch.testing.assert_close(a[:, :64], b[:, :64])
    assert not torch.allclose(a[:, 64:], b[:, 64:])


def spied(monkeypatch: pytest.MonkeyPatch, module: object) -> list[dict]:
    """What each training was given: its texts, its steps and its alpha."""
    trained, real = [], gpt.train

    def train(model, texts, steps, lr, seed, alpha=0.0, task=gpt.next_byte):
        given = {name: bytes(text.tolist()) for name, text in texts.items()}
        is_modular = isinstance(model, nemo.Modular)
        trained.append({"texts": given, "steps": steps, "lr": lr, "modular": is_modular})
        real(model, texts, steps, lr, seed, alpha, task)

    monkeypatch.setattr(module, "train", train)
    return trained


def test_the_gpt_is_trained_cut_and_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = spied(monkeypatch, gpt)
    size = ["--data", data, "--width", 16, "--depth", 2, "--steps", 20, "--work", tmp_path / "w"]
    run(gpt.main, "train", *size, "--seed", 1)
    (folder,) = (tmp_path / "w").glob("*/seed-1")
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    run(gpt.main, "train", *size, "--seed", 1)
    again = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert again == kept
    run(gpt.main, "report", *size, "--out", tmp_path)
    with (tmp_path / "gpt.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["language"] for row in rows] == ["ada", "bash"]
    assert all(float(row["error"]) < 1e-9 for row in rows)
    assert [bool(row["dense, long"]) for row in rows] == [False, True]
    (page,) = [line for line in (tmp_path / "gpt.md").read_text().split("\n") if "| bash" in line]
    assert f" {float(rows[1]['parameters']):,.0f} |" in page
    assert "nan" not in (tmp_path / "gpt.md").read_text()

    # both as long on all languages; then, of a language alone: module, standard and dense GPT
    texts, test = read(data)
    known = {name: bytes(text.tolist()) for name, text in texts.items()}
    assert [t["texts"] for t in trained[:2]] == [known, known]
    assert [t["modular"] for t in trained[:2]] == [False, True]
    own = [{"ada": known["ada"]}] * 3 + [{"bash": known["bash"]}] * 4
    assert [t["texts"] for t in trained[2:]] == own
    assert [t["steps"] for t in trained] == [20, 20, 2, 2, 12, 2, 2, 12, 20]

    def bits(model: torch.nn.Module, name: str, language: str) -> float:
        model.load_state_dict(gpt.load_file(folder / f"{name}.safetensors"))
        return gpt.bits_per_byte(model.eval(), test[language])

    modular = gpt.modular(gpt.GPT(16, 2))
    for row in rows:
        language = row["language"]
        found = {"standard": bits(gpt.GPT(16, 2), "standard", language)}
        found["modular"] = bits(modular, "modular", language)
        found["standard, fine-tuned"] = bits(gpt.GPT(16, 2), f"{language}-standard", language)
        masks = nemo.class_masks(modular, list(batches(texts, 200, 1)))
        chosen = dict(masks.select([list(texts).index(language)]))
        found["as cut"] = gpt.bits_per_byte(modular.under(chosen), test[language])
        module = nemo.decompose(modular, chosen)
        assert float(row["parameters"]) == sum(p.numel() for p in module.parameters())
        found["fine-tuned"] = bits(module, f"{language}-module", language)
        saved = nemo.load(folder / language)
        assert gpt.bits_per_byte(saved, test[language]) == pytest.approx(found["fine-tuned"])
        dense = gpt.as_large(int(float(row["parameters"])), 2)
        found["dense"] = bits(dense, f"{language}-dense", language)
        assert {key: float(row[key]) for key in found} == pytest.approx(found, rel=1e-4)
        assert len(set(found.values())) == 6
    (folder / "standard.safetensors").write_bytes(b"half")
    result = CliRunner().invoke(gpt.main, ["train", *map(str, size), "--seed", "1"])
    assert result.exit_code == 1
    assert "standard.safetensors: damaged" in result.output


def test_the_loss_on_masks_is_learned_from(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = read(data)
    weights = []
    for loss in (nemo.contrastive_loss, lambda masks, labels, tau: torch.zeros(())):
        monkeypatch.setattr(nemo, "contrastive_loss", loss)
        torch.manual_seed(0)
        modular = gpt.modular(gpt.GPT(16, 2))
        gpt.train(modular, texts, 3, 1e-3, 0, alpha=1.0)
        weights.append(next(modular.generators.parameters()))
    assert not torch.equal(*weights)


def test_goals_are_of_the_right_columns() -> None:
    row = {"standard": 2.0, "modular": 2.2, "as cut": 2.21, "fine-tuned": 2.04, "share": 0.4}
    row |= {"standard, fine-tuned": 1.9, "dense": 2.5, "dense, long": 2.0, "nrr": 0.3}
    row |= {"coupling": 0.5, "error": 2e-15}
    worse = {**row, "fine-tuned": 2.06, "share": 0.6}
    told = "\n".join(gpt.goals(pd.DataFrame([row, worse]), 1.234))
    for line in (
        "modular / standard (at most 1.15) | 1.23 | |", "(at most .50) | 0.50 | 0.60 |",
        "as cut - modular GPT | +0.010 | +0.010 |", "(at most +.050) | +0.050 | +0.060 |",
        "standard GPT, fine-tuned | +0.150 | +0.160 |", "(below 0) | -0.450 | -0.440 |",
        "one language a seed | +0.050 | +0.060 |",
    ):  # fmt: skip
        assert line in told


def test_the_classifier_tells_two_languages_apart_also_cut(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = spied(monkeypatch, text_classifier)
    measured, real = [], text_classifier.accuracy

    def accuracy(model, texts, classes, among):
        measured.append({name: bytes(text.tolist()) for name, text in texts.items()})
        return real(model, texts, classes, among)

    monkeypatch.setattr(text_classifier, "accuracy", accuracy)
    arguments = ["--data", data, "--seeds", 1, "--steps", 20, "--out", tmp_path]
    run(text_classifier.main, *arguments)
    with (tmp_path / "text_classifier.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["module"] == "ada+bash"
    assert float(row["standard"]) == float(row["modular"]) == float(row["module, as cut"]) == 1
    known, test = (
        {name: bytes(text.tolist()) for name, text in texts.items()} for texts in read(data)
    )
    assert [t["texts"] for t in trained] == [known, known]
    assert measured == [test] * 5
