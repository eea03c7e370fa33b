"""The `jrope` command: one file per subcommand, and one line per error.

A subcommand's file has `add_arguments(parser)` and `run(args) -> int`.  Exit status: 0,
2 for errors, 130 after Ctrl-C, 141 when the reader of standard output has gone; a
subcommand may return others and says so in its help.
"""

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn, cast

from jrope.errors import JropeError

COMMANDS = {
    "generate": "continue prompts with a model",
    "batch": "answer a file of prompts; a killed run goes on where it stopped",
    "inspect": "tell what a folder holds, without reading its weights",
    "convert": "rewrite a folder: dtype, shards, rotary embedding",
    "parity": "compare a model with PyTorch, stage by stage",
    "evaluate": "measure RoPE methods on texts: perplexity, passkeys, attention",
    "bench": "measure speed beside the device's own limits",
    "plan": "predict memory and speed on devices that are not here",
}
_COMPILING = ("generate", "batch", "parity", "evaluate")
_TOGETHER = ("generate", "evaluate")  # where several processes may be one command
_TORCHLESS = ("generate", "batch", "evaluate")  # of transformers only the tokenizers
_LONGEST = 2000  # characters of an error line


class _Parser(argparse.ArgumentParser):
    """Wrong usage is an error like others."""

    def error(self, message: str) -> NoReturn:
        raise JropeError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      argv: the words after `jrope`; None: those of this process.

    Returns:
      The exit status.  With JROPE_DEBUG in the environment, errors are raised instead.
    """
    try:
        words = [*(sys.argv[1:] if argv is None else argv)]
        if argv is None and words and words[0] in _TORCHLESS:
            # transformers imports PyTorch where it can, which takes seconds.
            sys.modules.setdefault("torch", cast(Any, None))
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except BrokenPipeError:  # `jrope ... | head`
        _discard_output()
        return 141
    except KeyboardInterrupt:
        status = _failed("interrupted", 130)
        if argv is None:  # threads may still compile, and would be waited for
            sys.stderr.flush()
            os._exit(status)
        return status
    except JropeError as error:
        return _failed(str(error))
    except OSError as error:
        file = f"{error.filename}: " if error.filename is not None else ""
        return _failed(f"{file}{error.strerror or error}")
    except Exception as error:
        kind, hint = type(error).__name__, "JROPE_DEBUG=1 shows where"
        return _failed(f"unexpected {kind}: {str(error)[:300]} ({hint})")


def _dispatch(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # terminals that lack a character
            stream.reconfigure(errors="replace")
    if not words or words[0] not in COMMANDS:
        parser = _top_parser()
        parser.parse_args(words[:1])
        parser.print_help(sys.stderr)
        return 2
    name = words[0]
    _check_together(name, words)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # errors are ours to tell
    module: Any = importlib.import_module(f"jrope.cli.{name}")
    text = COMMANDS[name]
    about = f"{text[0].upper()}{text[1:]}."
    parser = _Parser(prog=f"jrope {name}", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    if name in _COMPILING:
        text = "compile anew, and do not keep what was compiled for the next run"
        parser.add_argument("--no-compile-cache", action="store_true", help=text)
    args = parser.parse_intermixed_args(words[1:])
    if name in _COMPILING and not args.no_compile_cache:
        from jrope.cli.common import enable_compile_cache

        enable_compile_cache()
    if name in _TOGETHER:
        from jrope.cli.together import are_together, run_together

        if are_together(args):
            return run_together(args, words, module.run)
    return module.run(args)


def _check_together(name: str, words: Sequence[str]) -> None:
    """Raise where several processes are asked of a command for one."""
    asked = [word for word in words if re.match("--(distributed|coordinator)", word)]
    if asked and name not in _TOGETHER:
        known = " and ".join(_TOGETHER)
        raise JropeError(f"{asked[0]}: {name} runs in one process; {known} in several")


def _top_parser() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="jrope",
        usage="jrope [--help] [--version] COMMAND ...",
        description="LLaMA in JAX, with every RoPE extension as PyTorch computes it.",
        epilog=f"commands:\n{rows}\n\n'jrope COMMAND --help' tells more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"jrope {version('jrope')}"
    )
    # Reached with an unknown command only: known ones have parsers of their own.
    parser.add_argument(
        "command", nargs="?", choices=[*COMMANDS], help=argparse.SUPPRESS
    )
    return parser


def _failed(message: str, status: int = 2) -> int:
    """Tell what is wrong in one line, or raise for whoever debugs."""
    if os.environ.get("JROPE_DEBUG") and sys.exc_info()[1] is not None:
        raise
    line = " ".join(message.split())[:_LONGEST]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"jrope: error: {line}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Point standard output nowhere, so that flushing it at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
