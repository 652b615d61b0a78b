"""The `llama3v` command: `llama3v generate …` runs `generate.py`, and so on."""

import argparse
import importlib
import sys

from . import __version__

COMMANDS = {
    "generate": "ask about images, or about each image of a folder",
    "chat": "chat about images in the terminal",
    "server": "serve an OpenAI-compatible API and a web page",
    "embed": "embed folders of images with SigLIP",
    "search": "search a folder of pictures, and ask about what is found",
    "train": "train the projector or finetune Llama",
    "convert": "convert and quantize Hugging Face checkpoints",
    "synthesize": "have a teacher model write training conversations",
    "evaluate": "score checkpoints on benchmarks",
    "doctor": "check this machine: memory, what fits, correctness, speed",
    "mlx-lm": "run one of mlx-lm's own commands on a Llama3-V checkpoint",
}
# mlx-lm's commands that save a model: they write the config without its vision part.
SAVING = ("convert", "fuse", "awq", "dwq", "dynamic_quant", "gptq")


def mlx_lm(arguments: list[str]) -> None:
    """Run a command of mlx-lm, which then knows Llama3-V: `llama3v mlx-lm generate --model … --image …`."""
    parser = argparse.ArgumentParser(
        prog="llama3v mlx-lm",
        usage="llama3v mlx-lm COMMAND ...",
        description="Run one of mlx-lm's own commands (generate, chat, server, lora, perplexity, ...) on a converted "
        "Llama3-V checkpoint.",
        epilog="llama3v mlx-lm COMMAND --help lists the options of a command.",
    )
    parser.add_argument("command", metavar="COMMAND", help="as in mlx_lm.COMMAND")
    command = parser.parse_args(arguments[:1]).command
    if command in SAVING:
        parser.error(f"mlx_lm.{command} saves checkpoints without their vision part; use llama3v convert or train")
    from .cli import error_line, hush_libraries

    hush_libraries()  # before transformers is imported
    from mlx_lm import cli

    from .generation import register

    register()
    sys.argv = ["mlx_lm", *arguments]
    try:
        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as e:
        if str(e).startswith("CLI requires a subcommand"):
            parser.error(f"{command}: mlx-lm has no such command")
        print(f"error: {error_line(e)}", file=sys.stderr)
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="llama3v",
        usage="llama3v COMMAND ...",
        description="Llama3-V on Apple Silicon with MLX.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
        + "\n\nllama3v COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llama3v-mlx {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    if not arguments:
        parser.print_help()
        sys.exit(2)
    command = parser.parse_args(arguments[:1]).command
    if command == "mlx-lm":
        mlx_lm(arguments[1:])
    else:
        importlib.import_module(f".{command}", __package__).main(arguments[1:])


if __name__ == "__main__":
    main()
