"""Runs fuzzed command lines, each in a forked process of its own: python fuzz_server.py FOLDER SEED COUNT [LIMIT].

Prints one JSON object a case to stdout: args, edits, status, seconds, and fault, which is null where the command ended
as it should: in time, with status 0, 1, 2 or 75, an error line and no traceback, nothing written outside its folder.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STATUSES = {0, 1, 2, 75}
MEMORY = 16 << 30  # bytes of address space; what asks for more is to be refused before it does
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
}
FREE = ("/dev/", "/proc/")  # devices: /dev/null, shared memory
SHOWN = 3000  # characters of what a command printed


def make_template(folder: Path) -> None:
    """A tiny model, clips, manifest and configs that all commands work on, and files of every wrong kind."""
    import numpy as np
    import torch
    import yaml
    from PIL import Image

    from stdit.cli.main import app, run_command
    from stdit.data.decode.write import write_video
    from stdit.diffusion.solvers import unipc_config
    from stdit.models.transformer import STDiT, TransformerConfig
    from stdit.sampling.pipeline import FolderSettings, Pipeline
    from stdit.text.encoders import TextEncoder
    from stdit.text.small import build_word_tokenizer, small_umt5
    from stdit.vae.autoencoder import CausalVAE, VaeConfig
    from stdit.weights.lora.adapters import Adapter, Pair
    from stdit.weights.lora.write import write_adapter

    folder.mkdir()
    os.chdir(folder)
    torch.manual_seed(0)
    captions = ["a red circle moves left", "a blue square"]
    tokenizer = build_word_tokenizer(captions)
    config = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    sizes = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    settings = FolderSettings(fps=8, shapes=("16x16x5",), text_padding=16)
    transformer = STDiT(config)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.3)
    Pipeline(transformer, CausalVAE(sizes), encoder, unipc_config(), settings).save("model")
    pair = Pair(torch.zeros(2, 24), torch.zeros(32, 2), 1.0)
    write_adapter(Adapter({"blocks.0.ffn.0.weight": pair}), Path("lora.safetensors"), config)
    Path("videos").mkdir()
    for name, shade in (("a", 60), ("c", 160)):
        write_video(f"videos/{name}.mp4", np.full((6, 16, 16, 3), shade, np.uint8), 8)
    Image.new("RGB", (16, 16), (9, 90, 200)).save("videos/b.png")
    Path("videos/captions.csv").write_text(
        f"file,caption\na.mp4,{captions[0]}\nb.png,{captions[1]}\nc.mp4,{captions[1]}\n"
    )
    data = {"manifest": "manifest.parquet", "shapes": ["16x16x5", "16x16"], "fps": 8, "workers": 0, "start": "first"}
    common = {"data": data, "plan": {"largest_clips_per_step": 2}, "schedule": {"steps": 1}, "log": {"progress": False}}
    model = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 32}
    text = {"model": model, "vae": {"path": "model/vae"}, "text": {"path": "model", "padding": 16}}
    Path("dit.yaml").write_text(yaml.safe_dump({**common, **text, "parallel": {"deepspeed": None}}))
    vae = {"base_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temporal_downsample": [True, True], "z_dim": 4}
    Path("vae.yaml").write_text(yaml.safe_dump({**common, "vae": vae, "objective": {"kind": "vae"}}))
    Path("prompts.txt").write_text("\n".join(captions))
    Path("ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    for name in ("empty", "empty.mp4", "empty.safetensors", "empty.parquet", "empty.yaml"):
        Path(name).touch()
    for name in ("noise.bin", "noise.safetensors", "noise.mp4", "noise.parquet"):
        Path(name).write_bytes(bytes((37 * n + n * n // 7) % 256 for n in range(4096)))
    Path("text.json").write_text('"a text"')
    Path("list.json").write_text("[1, 2, {}]")
    Path("bad.jsonl").write_text('{"path": "a.mp4", "captions": "x"\n[]\nnull\n{"path": 3}\n')
    Path("bad.csv").write_text('file,caption\na.mp4,"x\n\0,\n')
    Path("latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("nul.txt").write_bytes(b"a\0b\n\n")
    Path("folder").mkdir()
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    assert run_command(app, ["data", "scan", "videos", "--out", "manifest.parquet", "--workers", "1"], "stdit") == 0


def warm_up() -> None:
    """Imports what commands import, so that a fork has it. Nothing is run: no thread may be there at a fork."""
    import fuzz_cases
    import matplotlib.pyplot  # noqa: F401
    import timm.optim  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import stdit.evaluation.captions
    import stdit.evaluation.harness
    import stdit.evaluation.vae
    import stdit.training.run  # noqa: F401

    torch.set_num_threads(1)
    fuzz_cases.commands()


def run_case(case: dict[str, Any], folder: Path, template: Path, limit: float) -> dict[str, Any]:
    """Runs a case in a copy of the template; the folder is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    folder.mkdir()
    copy = f"cp -a {template} {work}"
    assert os.system(copy) == 0, copy
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    log, outside = folder / "log", folder / "outside"
    begun = time.monotonic()
    child = os.fork()
    if not child:
        _child(case, folder, work, log, outside)
    status = _wait(child, begun + limit)
    seconds = time.monotonic() - begun
    printed = log.read_text(errors="replace") if log.exists() else ""
    written = outside.read_text(errors="replace").splitlines() if outside.exists() else []
    fault = _fault(status, printed, written, case, work)
    shutil.rmtree(folder, ignore_errors=True)
    result = {**case, "status": status, "seconds": round(seconds, 2), "fault": fault}
    return {**result, "printed": printed[-SHOWN:]} if fault else result


def _wait(child: int, until: float) -> int | None:
    """The exit status (negative: the signal), or None past the limit. Ends what the case has started, too."""
    found: int | None = None
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            found = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if found is None:
        os.waitpid(child, 0)
    return found


def _fault(status: int | None, printed: str, written: list[str], case: dict[str, Any], work: Path) -> str | None:
    if status is None:
        return "hang"
    if status < 0:
        return f"signal {signal.Signals(-status).name}"
    if "Traceback (most recent call last)" in printed:
        frames = re.findall(r'File "[^"]*?/(stdit/[^"]+)", line (\d+)', printed)
        last = next((line for line in reversed(printed.strip().splitlines()) if re.match(r"[\w.]+(: |$)", line)), "")
        return f"traceback at {':'.join(frames[-1]) if frames else '?'}: {last[:160]}"
    if status not in STATUSES:
        return f"status {status}"
    if status in (1, 2) and "rror" not in printed and case["args"][:2] != ["weights", "inspect"]:
        return "no error line"
    named = [str(Path(work, word.partition("=")[2] or word)) for word in case["args"]]
    named += [str(Path(work, str(value))) for *_, value in case["edits"]]
    for path in written:
        if not any(Path(path).is_relative_to(os.path.normpath(place)) for place in named if "\0" not in place):
            return f"wrote outside: {path}"
    return None


def _child(case: dict[str, Any], folder: Path, work: Path, log: Path, outside: Path) -> None:
    """Becomes the command; never returns."""
    status = 99
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        refused = os.open(outside, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        os.chdir(work)
        os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"), PYTHONDONTWRITEBYTECODE="1")
        os.environ.update(XDG_CACHE_HOME=str(folder / "home" / "cache"), COLUMNS="200")
        tempfile.tempdir, sys.dont_write_bytecode = None, True
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from fuzz_cases import apply

        from stdit.cli.main import app, run_command
        from stdit.data.remote.storage import STORAGE

        apply(work, case["edits"])
        STORAGE.pause = 0.0  # what cannot be reached is not waited for
        sys.addaudithook(_guard(str(folder), refused))
        status = run_command(app, case["args"], "stdit")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _guard(folder: str, refused: int) -> Any:
    """An audit hook: no network, and no change outside the folder; what was tried is written to `refused`."""
    shared = Path(folder).parent / "tmp"  # of libraries that chose their temporary folder when they were imported

    def within(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))) or "/")
        return f"{place}/".startswith((f"{folder}/", f"{shared}/", *FREE)) or os.fsdecode(path).startswith(FREE)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            paths = args[:1] if isinstance(args[2], int) and args[2] & WRITES else ()
        elif event in CHANGES:
            paths = args[: CHANGES[event]] if event != "os.symlink" else args[1:2]
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            raise socket.gaierror(-2, "Name or service not known")
        elif event == "socket.connect" and isinstance(args[1], tuple):
            raise OSError(101, "Network is unreachable")
        else:
            return
        for path in paths:
            if not within(path) and not (event == "os.mkdir" and os.path.isdir(path)):
                place = os.path.abspath(os.fsdecode(path))
                os.write(refused, f"{place}\n".encode(errors="replace"))
                raise PermissionError(13, "Permission denied", place)

    return hook


def main() -> None:
    folder, seed, count = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    limit = float(sys.argv[4]) if len(sys.argv) > 4 else 120.0
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    for place in (home, folder / "tmp"):
        place.mkdir(exist_ok=True)
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ["TMPDIR"] = str(folder / "tmp")
    template = folder / "template"
    if not template.exists():
        if not (maker := os.fork()):
            try:
                make_template(template)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(maker, 0)[1] == 0, "the template was not made"
    warm_up()
    from fuzz_cases import Cases

    cases = Cases(seed, template)
    gc.freeze()
    for number in range(count):
        case = cases.next()
        result = run_case(case, folder / f"case-{os.getpid()}", template, limit)
        print(json.dumps({"number": number, **result}), flush=True)
    print(json.dumps({"done": count}), flush=True)


if __name__ == "__main__":
    main()
