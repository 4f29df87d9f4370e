"""The examples on sequences, on texts that are made here."""

import csv
import math
import tarfile
from pathlib import Path

import pytest
import torch
from click import ClickException
from click.testing import CliRunner

import nemo
from examples import gpt, text_classifier

WORDS = {"ada": b"begin if x then y := 1; end if; ", "bash": b"for f in *; do echo $f; done\n"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for split, times in (("train", 60), ("test", 20)):
        for language, words in WORDS.items():
            folder = root / split / language
            folder.mkdir(parents=True)
            (folder / "b.txt").write_bytes(words * times)
            (folder / "a.txt").write_bytes(b"first " + words)
    return root


def run(command: object, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_files_of_a_language_are_read_in_order(data: Path) -> None:
    _, texts = gpt.read(data)
    assert list(texts) == ["ada", "bash"]
    first = b"first " + WORDS["ada"]
    assert bytes(texts["ada"].tolist()) == first + b"\n" + WORDS["ada"] * 20 + b"\n"


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
    for a, b in zip(gpt.read(data), gpt.read(tmp_path / "texts.tar"), strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    (tmp_path / "not.tar").write_text("text")
    with pytest.raises(ClickException, match=r"not\.tar is no \.tar; accepted: a folder, or"):
        gpt.read(tmp_path / "not.tar")


def test_a_report_of_nothing_says_what_is_missing(data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(gpt.main, ["report", "--data", str(data), "--work", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no seed-*.csv; accepted: data and options that `train` was given" in result.output


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


def test_the_gpt_is_trained_cut_and_reported(data: Path, tmp_path: Path) -> None:
    size = ["--data", data, "--width", 16, "--depth", 2, "--steps", 20, "--work", tmp_path / "w"]
    run(gpt.main, "train", *size, "--seed", 1)
    (folder,) = (tmp_path / "w").glob("*/seed-1")
    kept = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    run(gpt.main, "train", *size, "--seed", 1)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == kept
    run(gpt.main, "report", *size, "--out", tmp_path)
    with (tmp_path / "gpt.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["language"] for row in rows] == ["ada", "bash"]
    assert all(float(row["error"]) < 1e-9 for row in rows)
    assert all(0 < float(row["fine-tuned"]) < 8 for row in rows)
    assert [bool(row["dense, long"]) for row in rows] == [False, True]

    texts, test = gpt.read(data)
    modular = gpt.modular(gpt.GPT(16, 2))
    state = gpt.load_file(folder / "modular.safetensors")
    modular.load_state_dict(state)
    masks = nemo.class_masks(modular, list(gpt.batches(texts, 200, 1)))
    masked = modular.eval().under(dict(masks.select([1])))
    assert gpt.bits_per_byte(masked, test["bash"]) == pytest.approx(
        float(rows[1]["as cut"]), rel=1e-4
    )
    assert "| bash" in (tmp_path / "gpt.md").read_text()


def test_the_classifier_tells_two_languages_apart_also_cut(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, "--seeds", 1, "--steps", 20, "--out", tmp_path]
    run(text_classifier.main, *arguments)
    with (tmp_path / "text_classifier.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["module"] == "ada+bash"
    assert float(row["standard"]) == float(row["modular"]) == float(row["module, as cut"]) == 1
