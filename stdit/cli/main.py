"""The `stdit` command: its sub-commands, and the exit status of every command.

Exit status: 0 done, 1 failed, 2 wrong arguments, 75 saved after a signal (requeue me), 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from stdit import __version__
from stdit.cli.common.lazy import WORDS, as_command, lazy_group
from stdit.errors import Interrupted, StditError
from stdit.files import disk_trouble
from stdit.heartbeat import HEARTBEAT
from stdit.machine import is_out_of_memory, shorten_spin

DATA = """Scan, caption, plan and encode clips; render the built-in toy clips.

Example: stdit data scan videos --out videos/manifest.parquet
"""
HELP = """Spacetime-patch diffusion transformers for text-to-video: pretrain, fine-tune and sample any shape.

Example: stdit train toy/dit run=runs/toy
"""
INSPECT = "Show family, dialect, size, dtype, and missing or unexpected tensors, without reading any."
CONVERT = "Convert weights to another layout or dtype; in the same dtype bit for bit. One tensor in memory at a time."
CAPTIONS = "Measure whether a model follows its captions, by its loss and by its samples."
VAE = "Measure how well a VAE reconstructs clips, and the statistics of its latents."
TOY = "Sample captions that a toy model never saw, and read from the pixels what the clips show."

COMMANDS: dict[str, tuple[str, str] | typer.Typer] = {
    "data": lazy_group("data", DATA, {
        "scan": ("stdit.cli.data.scan", "Probe every file of a folder and write the manifest."),
        "caption": ("stdit.cli.data.caption", "Caption a manifest's clips with a local vision-language model."),
        "plan": ("stdit.cli.data.plan", "Show what training will do: buckets, packs, balance, drops, memory."),
        "encode": ("stdit.cli.data.encode", "Encode a manifest's latents and text embeddings; resumable."),
        "merge": ("stdit.cli.data.merge", "Join what the parts (--part) of a scan, caption or encode have made."),
        "toy": ("stdit.cli.data.toy", "Render the built-in toy clips."),
    }),
    "train": ("stdit.cli.train", "Train a VAE or a diffusion transformer, alone or under torchrun."),
    "sample": ("stdit.cli.sample.command", "Text (and known frames) to video, at any shape."),
    "weights": lazy_group("weights", "Inspect and convert weights.", {
        "inspect": ("stdit.cli.weights", INSPECT), "convert": ("stdit.cli.weights", CONVERT),
    }),
    "eval": lazy_group("eval", "Measure a trained model.", {
        "captions": ("stdit.cli.eval.captions", CAPTIONS),
        "vae": ("stdit.cli.eval.vae", VAE),
        "toy": ("stdit.cli.eval.toy", TOY),
    }),
}  # fmt: skip
MAY_BE_EMPTY = ("--prompt", "--negative")  # options that take a text
app = lazy_group("stdit", HELP, COMMANDS)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"stdit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """The options before the sub-command."""


def main() -> None:
    """The entry point `stdit`."""
    sys.exit(run_command(app, prog="stdit"))


def run_command(command: Callable[..., Any] | typer.Typer, args: Sequence[str] | None = None, prog: str = "") -> int:
    """Runs a typer app, or a function with typer's annotations, and returns the exit status.

    An error that the user can fix becomes one message on stderr. Any other exception is our bug and keeps its
    traceback. An integer that the command returns is its exit status.
    """
    prog = prog or os.path.basename(sys.argv[0])
    # On a CPU, clips of many shapes need more compiled convolutions than oneDNN caches by default (1024).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    shorten_spin()
    given = [str(word) for word in (sys.argv[1:] if args is None else args)]
    if (blank := _blank(given)) is not None:
        return _say(f"error: {blank} is empty. Name a file, a folder or a value.\nTry: {prog} --help", 2)
    WORDS.set((*prog.split(), *given))
    try:
        try:
            result = as_command(command, prog).main(args=args, prog_name=prog, standalone_mode=False)
        finally:
            HEARTBEAT.stop()
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort) as error:
        # Newer versions of typer return 130 themselves, older ones abort.
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
        return 130 if interrupted else _say("stopped", 1)
    except Interrupted as error:
        return _say(str(error), error.status)
    except StditError as error:
        return _say(f"error: {error}", 1)
    except BrokenPipeError:
        return _silence_stdout()
    except SystemExit as error:
        if error.code == 1 and isinstance(error.__context__, BrokenPipeError):
            return _silence_stdout()
        raise
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's
            return _usage_error(error)
        if message := _fixable(error):
            return _say(f"error: {message}", 1)
        raise
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _blank(args: Sequence[str]) -> str | None:
    """The first option or argument that is empty, as an unset shell variable makes it; None if there is none.

    An empty path would mean the current folder. Options that take a text may be empty.
    """
    for before, word in zip(["", *args], args):
        option, equals, value = word.partition("=")
        if not (option.startswith("--") and equals):
            option, value = before if before.startswith("--") and "=" not in before else "an argument", word
        if not value.strip() and option not in MAY_BE_EMPTY:
            return option
    return None


def _say(message: str, status: int) -> int:
    try:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    except OSError:  # nobody reads our output, or its disk is full; the exit status still tells
        _silence_stdout()
    return status


def _usage_error(error: Any) -> int:
    """Prints the usage and the error. Without any arguments, prints the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    lines = [f"error: {error.format_message()}"]
    if context := getattr(error, "ctx", None):
        lines = [context.get_usage(), *lines, f"Try: {context.command_path} --help"]
    return _say("\n".join(lines), error.exit_code)


def _silence_stdout() -> int:
    """Drops all further output after the reader closed the pipe (`stdit … | head`), also at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _fixable(error: BaseException) -> str:
    """The message for a system error that the user can fix, else ''. Looks at its causes, too: libraries wrap."""
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        place = f"{seen.filename}: " if isinstance(seen, OSError) and seen.filename else ""
        if said := disk_trouble(seen):
            return f"{place}{said}"
        if number in (errno.EACCES, errno.EPERM):
            return f"{place}{os.strerror(number)}. Change its permissions, or choose another path."
        if number in (errno.EIO, errno.ESTALE):
            return f"{place}{os.strerror(number)}: the disk, or the network behind it, failed. Try again, or check it."
        if number in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return f"{place}{os.strerror(number)}. Choose another path."
        said = str(seen).splitlines()[0] if str(seen) else ""
        if isinstance(seen, RuntimeError) and said.startswith("Symlink loop"):  # pathlib's, until Python 3.13
            return f"{said}. Choose another path."
        if is_out_of_memory(seen):
            return (
                f"out of memory ({said or 'the machine gives no more'}). Choose smaller sizes, fewer frames or a "
                "smaller model; for a VAE see --memory."
            )
        seen = seen.__cause__ or seen.__context__
    return ""


if __name__ == "__main__":
    main()
