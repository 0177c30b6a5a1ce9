"""List, load, unload and scale the models of a running server.

A checkpoint's name stands for all of its parts: `models.py load sd15` is `models.py load sd15.unet sd15.clip sd15.vae`.
So does its file's name. A model's name stands for all of its versions.
"""

import _environment

_environment.ensure()

import argparse
import sys

from rich.console import Console
from rich.markup import escape

from luna_client.manager import Manager
from luna_protocol.errors import LunaError
from serving.loading import load, overview
from serving.selection import named


def show_list(server: Manager, console: Console) -> int:
    index = server.index()
    console.print(overview(index))
    idle = [model.name for model in index.models if not model.workers]
    console.print(f"not loaded: {', '.join(idle) or 'none'}")
    servable = escape(", ".join(index.servable)) or "none"
    console.print(f"checkpoints without archives (add_checkpoint.py NAME): {servable}")
    return 0


def show_loaded(server: Manager, models: list[str], console: Console) -> int:
    """What has become of their workers; 1 if one of them does not serve."""
    index = server.index()
    index.models = [model for model in index.models if model.name in models]
    console.print(overview(index))
    served = {model.name for model in index.models if {worker.state for worker in model.workers} == {"ready"}}
    return 0 if served == set(models) else 1


def show_versions(server: Manager, model: str, console: Console) -> None:
    versions, default = server.versions(model)
    for version in versions:
        console.print(f"{version}{'  (default)' if version == default else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="of the server, as given to serve.py (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is loaded, what could be")
    for command, told in (("load", "have workers started"), ("unload", "end the workers once nobody waits for them")):
        commands.add_parser(command, help=told).add_argument("names", nargs="+", metavar="NAME")
    scale = commands.add_parser("scale", help="change the number of a model's workers")
    scale.add_argument("name", metavar="NAME")
    scale.add_argument("workers", type=int, metavar="N", help="at least 1; unload ends the last")
    commands.add_parser("versions", help="a model's versions").add_argument("name", metavar="NAME")
    default = commands.add_parser("set-default", help="have a version answer to the model's plain name")
    default.add_argument("name", metavar="NAME")
    default.add_argument("version", metavar="VERSION")
    arguments = parser.parse_args()
    if arguments.command == "scale" and arguments.workers < 1:
        parser.error(f"{arguments.workers} workers: give 1 or more; unload ends the last")
    console = Console()
    host = "http://127.0.0.1"
    server = Manager(f"{host}:{arguments.port}", f"{host}:{arguments.port + 1}")
    try:
        match arguments.command:
            case "list":
                return show_list(server, console)
            case "load":
                models = named(server.index(), arguments.names)
                load(server, models, console)
                return show_loaded(server, models, console)
            case "unload":
                for model in named(server.index(), arguments.names):
                    server.unload(model)
                    console.print(f"{model} unloaded")
            case "scale":
                models = named(server.index(), [arguments.name])
                for model in models:
                    server.scale(model, arguments.workers)
                server.wait_ready(models)
                return show_loaded(server, models, console)
            case "versions":
                show_versions(server, arguments.name, console)
            case "set-default":
                server.set_default(arguments.name, arguments.version)
                show_versions(server, arguments.name, console)
        return 0
    except LunaError as error:
        console.print(f"[red]{escape(str(error))}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
