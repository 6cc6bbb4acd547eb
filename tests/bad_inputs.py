"""Bad input of every kind, each given to the command line as a user would; what it says is the table of docs/reliability.md.

python tests/bad_inputs.py          writes the table anew (tests/test_reliability.py compares)
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fsspec  # noqa: E402
import torch  # noqa: E402
from fkd_files import write_labels  # noqa: E402
from photos import write_photos, write_store  # noqa: E402
from sources import write_shards, write_tar  # noqa: E402

from ferkd.cli import main  # noqa: E402

PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- the table is written by tests/bad_inputs.py -->", "<!-- end of the table -->"
TRAIN = ["train", "--data", "data", "--student", "python:photos:tiny_net", "--out", "run", "--batch-size", "12", "--epochs", "4"]
TRAIN += ["--warmup-epochs", "0", "--workers", "0", "--log-every", "2", "--eval-every", "2", "--eval-crop-pct", "1.0"]
STORED = [*TRAIN, "--labels", "labels"]
ELSEWHERE = [*TRAIN, "--labels", "memory://labels"]
TARS, STORED_TARS = ([*command[:2], "wds:shards", *command[3:]] for command in (TRAIN, STORED))
LABEL = ["label", "--data", "data", "--teacher", "python:photos:colour_teacher", "--out", "store", "--crops", "4", "--topk", "2"]
Spoil = Callable[[], object]


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def flip(path: str, at: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(bytes(data))


def cut(path: str, share: float = 0.99) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(share * len(data))])


def edit_manifest(**changes: object) -> None:
    manifest = json.loads(Path("labels/manifest.json").read_bytes())
    manifest.update(changes)
    Path("labels/manifest.json").write_text(json.dumps(manifest))


def shard() -> str:
    return str(min(Path("labels/shards").iterdir()))


def another_store() -> None:
    write_photos(Path("other"), seed=1)
    shutil.rmtree("labels")
    write_store(Path("other"), Path("labels"))


def trained(*flags: str) -> None:
    quiet([*TRAIN, *flags])


def hostile_weights() -> None:
    torch.save({"state_dict": Code()}, "weights.pth")


def hostile_labels() -> None:
    write_labels(Path("data"), Path("fkd"), "marginal_smoothing_k5")
    torch.save([Code()], min(Path("fkd").glob("train/*/*.tar")))


def colliding_checkpoints() -> None:
    trained()
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if Path("run", name).exists():
            flip(f"run/{name}", 1000)


def bomb() -> None:
    data = Path("data/train/red/0.png").read_bytes()
    header = b"IHDR" + (32_000).to_bytes(4, "big") * 2 + data[24:29]
    Path("data/val/red/0.png").write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])


def elsewhere(spoil: Spoil) -> None:
    """Puts labels, spoilt, where memory://labels is."""
    spoil()
    files = fsspec.filesystem("memory")
    if files.exists("/labels"):
        files.rm("/labels", recursive=True)
    files.put(f"{Path('labels').resolve()}/", "/labels/", recursive=True)


def tars() -> Path:
    return write_shards(Path("data"), Path("shards"), shards=1) / "train/000.tar"


def tar_of(*names: str) -> Path:
    return write_tar(tars(), [(name, b"1") for name in names])


CASES: list[tuple[str, Spoil, list[str]]] = [
    ("no such folder", lambda: shutil.rmtree("data"), TRAIN),
    ("the folder train instead of the one above it", lambda: None, [*TRAIN[:2], "data/train", *TRAIN[3:]]),
    ("photographs without class folders", lambda: (shutil.rmtree("data/train"), Path("data/train").mkdir()), TRAIN),
    ("a class folder without an image", lambda: [p.unlink() for p in Path("data/train/red").iterdir()], TRAIN),
    ("a class that val lacks", lambda: shutil.rmtree("data/val/red"), TRAIN),
    ("one class alone", lambda: [shutil.rmtree(f"data/{s}/{c}") for s in ("train", "val") for c in ("red", "blue")], TRAIN),
    ("a link to nothing", lambda: Path("data/train/red/x.png").symlink_to("nowhere.png"), TRAIN),
    ("0 bytes, among good photographs", lambda: Path("data/train/red/0.png").write_bytes(b""), TRAIN),
    ("no image, among good photographs", lambda: Path("data/train/red/0.png").write_bytes(b"<html>"), TRAIN),
    ("cut short, when labelling", lambda: cut("data/train/red/0.png", 0.5), [*LABEL, "--skip-preflight"]),
    ("a decompression bomb in val", bomb, ["eval", "--data", "data", "--teacher", "python:photos:colour_teacher", "--workers", "0"]),
    ("no tar shards", lambda: Path("shards").mkdir(), TARS),
    ("compressed shards", lambda: tars().rename("shards/train/000.tar.gz"), TARS),
    ("shards in two places", lambda: shutil.copy(tars(), "shards/birds-train-0.tar"), TARS),
    ("a tar cut short", lambda: cut(str(tars()), 0.5), TARS),
    ("a tar with a damaged header", lambda: flip(str(tar_of("a.png", "a.cls")), 1030), TARS),
    ("a sample that comes twice in a tar", lambda: tar_of("a.png", "a.cls", "b.png", "b.cls", "a.json"), TARS),
    ("a tar's path that leads out of it", lambda: tar_of("../a.png", "../a.cls"), TARS),
    ("samples without a class", lambda: tar_of("a.png", "b.png"), TARS),
    ("labels of a folder, and photographs in tars", lambda: tars(), STORED_TARS),
    ("no such dataset of Hugging Face", lambda: None, [*TRAIN[:2], "hf:./birds", *TRAIN[3:]]),
    ("an option that a dataset has none of", lambda: None, [*TRAIN[:2], "hf:birds?split=train", *TRAIN[3:]]),
    ("a teacher that nobody knows", lambda: None, [*LABEL[:4], "timm:resnet5o", *LABEL[5:]]),
    ("a teacher without its kind", lambda: None, [*LABEL[:4], "resnet50", *LABEL[5:]]),
    ("a run as a teacher without its kind", lambda: Path("run").mkdir(), [*LABEL[:4], "run", *LABEL[5:]]),
    ("a run that is not there", lambda: None, [*LABEL[:4], "run:runs", *LABEL[5:]]),
    ("a teacher's module that does not exist", lambda: None, [*LABEL[:4], "python:nowhere:make", *LABEL[5:]]),
    ("a folder that is no class of the teacher", lambda: [os.rename(f"data/{s}/red", f"data/{s}/rot") for s in ("train", "val")], LABEL),
    ("a teacher with the wrong normalisation", lambda: None, [*LABEL[:4], "python:test_step:wrong_teacher", *LABEL[5:]]),
    ("a teacher that answers probabilities", lambda: None, [*LABEL[:4], "python:test_step:softmax_teacher", *LABEL[5:]]),
    ("more answers than training takes", lambda: None, [*LABEL[:-1], "65"]),
    ("more answers than classes", lambda: None, [*LABEL[:-1], "9"]),
    ("weights that hold code", hostile_weights, [*LABEL, "--teacher-weights", "weights.pth"]),
    ("weights of another network", lambda: torch.save({"fc.weight": torch.zeros(2, 2)}, "w.pth"), [*LABEL, "--teacher-weights", "w.pth"]),
    ("another store in the way", lambda: quiet([*LABEL, "--skip-preflight"]), [*LABEL, "--crops", "5", "--skip-preflight"]),
    ("a folder that is no store", lambda: Path("labels/manifest.json").unlink(), STORED),
    ("a manifest that was edited", lambda: edit_manifest(k=3), STORED),
    ("a manifest that is no JSON", lambda: cut("labels/manifest.json"), STORED),
    ("a shard cut short", lambda: cut(shard()), STORED),
    ("a shard with one flipped bit", lambda: flip(shard(), 500), STORED),
    ("a shard that is gone", lambda: Path(shard()).unlink(), STORED),
    ("an index with one flipped bit", lambda: flip(str(next(Path("labels").glob("index.bin"))), 90), STORED),
    ("a photograph that was changed since it was labelled", lambda: shutil.copy("data/val/red/0.png", "data/train/red/1.png"), STORED),
    ("a photograph that was deleted since", lambda: Path("data/train/red/1.png").unlink(), STORED),
    ("the store of another dataset", another_store, STORED),
    ("thresholds out of order", lambda: None, [*STORED, "--discard-below", "0.5", "--calibrate-below", "0.2"]),
    ("thresholds that discard everything", lambda: None, [*STORED, "--discard-above", "0.0"]),
    ("thresholds without labels", lambda: None, [*TRAIN, "--discard-below", "0.5"]),
    ("a temperature for hard labels", lambda: None, [*TRAIN, "--temperature", "4"]),
    ("a threshold of 30 %", lambda: None, [*STORED, "--discard-below", "30"]),
    ("a batch that crops do not divide", lambda: None, [*STORED, "--batch-size", "10"]),
    ("a learning rate that loses the weights", lambda: None, [*STORED, "--lr", "1e30"]),
    ("a student of other classes", lambda: None, [*TRAIN[:4], "python:photos:four_outputs", *TRAIN[5:]]),
    ("a run in the way", trained, TRAIN),
    ("a run of other settings", trained, [*TRAIN, "--resume", "--lr", "0.2"]),
    ("no run to go on with", lambda: None, [*TRAIN, "--resume", "must"]),
    ("checkpoints with flipped bits", colliding_checkpoints, [*TRAIN, "--resume"]),
    ("other people's labels that hold code", hostile_labels, ["convert", "fkd", "fkd", "store", "--data", "data"]),
    ("a folder that is no run", lambda: None, ["report", "data"]),
    ("a page on top of a run's log", trained, ["report", "run", "--out", "run/log.jsonl"]),
    ("an unknown flag", lambda: None, [*TRAIN, "--learning-rate", "1"]),
    ("a mistyped flag", lambda: None, [*TRAIN, "--epoch", "1"]),
    ("a flag left out", lambda: None, ["train", "--data", "data"]),
    ("letters for a number", lambda: None, [*TRAIN, "--lr", "high"]),
    ("a choice that is none", lambda: None, [*TRAIN, "--mix", "blend"]),
    ("a mistyped command", lambda: None, ["tran"]),
    ("an unknown command", lambda: None, ["distil"]),
    ("a store elsewhere that is not there", lambda: None, [*TRAIN, "--labels", "file:///nowhere/labels"]),
    ("a web page where a store should be", lambda: elsewhere(lambda: Path("labels/manifest.json").write_text("<html>")), ELSEWHERE),
    ("a store elsewhere with one flipped bit", lambda: elsewhere(lambda: flip(shard(), 500)), ELSEWHERE),
    ("a kind of address that nobody knows", lambda: None, [*TRAIN, "--labels", "nosuch://host/labels"]),
    ("a store to be written elsewhere", lambda: None, [*LABEL[:6], "s3://bucket/labels", *LABEL[7:]]),
]


def quiet(arguments: list[str]) -> tuple[int, str]:
    """A command's exit status and what it said on stderr."""
    said = io.StringIO()
    logging.getLogger().handlers.clear()  # main() gives it the stderr of the moment
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
    return status, said.getvalue()


def answers() -> list[tuple[str, int, str]]:
    """What each kind of bad input gets: (kind, exit status, the line that says it)."""
    found = []
    before, cache = Path.cwd(), os.environ.get("FERKD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FERKD_CACHE"] = f"{folder}/cache"
        whole = Path(folder) / "whole"
        write_photos(whole / "data")
        write_store(whole / "data", whole / "labels")
        try:
            for number, (kind, spoil, command) in enumerate(CASES):
                work = Path(folder) / f"case{number}"
                shutil.copytree(whole, work)
                os.chdir(work)
                spoil()
                status, said = quiet(command)
                assert not Path("pwned").exists(), kind
                lines = [line for line in said.splitlines() if line.startswith(("ferkd ", "ferkd:")) or "/0.png" in line]
                assert lines, f"{kind}: {said[-2000:]}"
                assert "Traceback" not in said, f"{kind}: {said[-2000:]}"
                found.append((kind, status, lines[-1].removeprefix(f"ferkd {command[0]}: ").strip()))
        finally:
            os.chdir(before)
            os.environ.pop("FERKD_CACHE")
            os.environ.update({} if cache is None else {"FERKD_CACHE": cache})
    return found


def table() -> str:
    rows = ["| what is wrong | what is said | exit status |", "|---|---|---|"]
    for kind, status, line in answers():
        line = re.sub(r"\S*/case\d+\b/?", "", line)
        line = re.sub(r"(CRC32|SHA-256) [0-9a-f]{8,}|line \d+ column \d+ \(char \d+\)", lambda at: f"{at[0].split()[0]} ...", line)
        rows.append(f"| {kind} | {line.replace('|', chr(92) + '|')} | {status} |")
    return "\n".join(rows)


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n\n{table()}\n\n{after}")
