"""Serve the model store in the foreground. Ctrl-C or SIGTERM ends all of it: Java and workers too.

What was loaded when the server ended is loaded again, with as many workers; what was unloaded stays so until
scripts/models.py, ComfyUI or curl loads it. Archives that are new in the store are loaded.
"""

import _environment

_environment.ensure()

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from engine.memory_budget import Budgets
from engine.roots import Roots
from luna_client.manager import Manager
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.model_names import role_of
from serving.archives import pack_repository, refresh
from serving.keeper import Keeper, Registered
from serving.loading import load, overview
from serving.read_ahead import read_ahead
from serving.specs import SpecError
from serving.stopping import Stopped, stop_on_signals
from serving.torchserve import ROOT, Ports, TorchServe


def restored(store: list[str], registered: dict[str, int]) -> dict[str, int | None]:
    """{model: workers to start, None for as many as its archive says} of what the store holds, in order."""
    wanted = {model: registered.get(model) for model in store}
    # Whatever was unloaded, the repository model is what tells of it.
    return {model: count for model, count in wanted.items() if count != 0} | {"repository": None}


def of_role(model: str, role: str | None) -> bool:
    """Whether the model is of this role; of any, for None. The repository is of all."""
    return role is None or model == "repository" or role_of(model) == role


def exposed(arguments: argparse.Namespace, ports: Ports) -> dict[str, str]:
    """TorchServe's settings for a server behind a proxy; management stays on loopback."""
    if not arguments.behind_proxy:
        return {}
    return {
        "inference_address": f"http://0.0.0.0:{ports.inference}",
        "metrics_address": f"http://0.0.0.0:{ports.metrics}",
        "disable_token_authorization": "true",
    }


def announce(console: Console, torchserve: TorchServe, server: Manager) -> None:
    console.print(overview(server.index()))
    console.print(f"inference   {torchserve.inference}", f"management  {torchserve.management}", sep="\n")
    console.print(f"metrics     {torchserve.metrics}/metrics", f"tokens      {torchserve.key_file}", sep="\n")
    console.print(f"logs        {torchserve.log.parent}", "Ctrl-C stops it.", sep="\n", soft_wrap=True)


def main() -> int:
    console = Console()
    try:
        roots = Roots.from_environment(ROOT)
    except LunaError as error:
        console.print(f"[red]{escape(str(error))}")
        return 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--port", type=int, default=8080, help="inference; management and metrics take the next two. 0: free ones"
    )
    parser.add_argument(
        "--store", type=Path, default=roots.model_store, help="the folder of the archives (%(default)s)"
    )
    parser.add_argument(
        "--run", type=Path, default=roots.run, help="the folder for tokens, logs and state (%(default)s)"
    )
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="use this ComfyUI's model folders too")
    parser.add_argument(
        "--memory",
        metavar="DEVICE=SIZE,...",
        help="most that weights and caches may take of a device, such as 0=20GB,cpu=8GB; models that are not used make "
        "room for others and come back when they are (three quarters of each GPU; a CPU has no bound)",
    )
    parser.add_argument(
        "--behind-proxy",
        action="store_true",
        help="answer inference and metrics on every network address and ask for no token: for a container or a private "
        "network, behind a proxy that does ask (docs/security.md)",
    )
    parser.add_argument("--only", choices=("unet", "clip", "vae"), help="serve the models of this role alone")
    arguments = parser.parse_args()
    if arguments.comfyui:
        os.environ["LUNA_COMFYUI"] = str(arguments.comfyui.absolute())
    if arguments.memory:
        os.environ["LUNA_MEMORY"] = arguments.memory
    stop_on_signals()
    try:
        # What cannot be read is told here, once, and not by every worker.
        Roots.from_environment(ROOT)
        Budgets.from_environment()
        ports = Ports.from_first(arguments.port)
        with TorchServe(arguments.store, arguments.run, ports, **exposed(arguments, ports)) as torchserve:
            # What follows changes things, and only here is it sure that no other server runs in the folder.
            pack_repository(arguments.store)
            archives = {archive.model: archive for archive in refresh(arguments.store)}
            for path in sorted({*arguments.store.glob("*.mar")} - {archive.path for archive in archives.values()}):
                console.print(f"[yellow]{escape(str(path))} is broken, or no archive of ours: it is left alone")
            registered = Registered.read(arguments.run)
            wanted = restored([model for model in archives if of_role(model, arguments.only)], registered.workers)
            # Of a file, the UNet is the most.
            read_ahead(filter(None, (archives[model].checkpoint for model in wanted if of_role(model, "unet"))))
            server = Manager(torchserve.inference, torchserve.management, torchserve.key_file)
            load(server, wanted, console, workers=wanted)
            for model, version in registered.default_versions.items():
                with suppress(NotFound):  # a version that is not loaded any more
                    server.set_default(model, version)
            keeper = Keeper(server, arguments.run, lambda model: of_role(model, arguments.only))
            keeper.start()
            try:
                announce(console, torchserve, server)
                status = torchserve.wait()
            finally:
                keeper.stop()
            console.print(
                f"[red]TorchServe ended by itself with status {status}. Its last words:[/]\n{escape(torchserve.tail())}"
            )
            return 1
    except Stopped:
        console.print("Stopped.")
        return 0
    except (LunaError, SpecError, RuntimeError, OSError) as error:
        console.print(f"[red]{escape(str(error))}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
