"""Serve every archive of the model store in the foreground. Ctrl-C or SIGTERM ends all of it: Java and workers too."""

import _environment

_environment.ensure()

import argparse
import sys
from pathlib import Path

from rich.console import Console

from comfy_client.server import Server
from handlers.engine.roots import Roots
from protocol.errors import LunaError
from serving.archives import pack_repository, refresh
from serving.loading import load, overview
from serving.specs import SpecError
from serving.stopping import Stopped, stop_on_signals
from serving.torchserve import ROOT, Ports, TorchServe


def main() -> int:
    roots = Roots.from_environment(ROOT)
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
    arguments = parser.parse_args()
    console = Console()
    stop_on_signals()
    try:
        pack_repository(arguments.store)
        refresh(arguments.store)
        models = sorted(path.stem for path in arguments.store.glob("*.mar"))
        with TorchServe(arguments.store, arguments.run, Ports.from_first(arguments.port)) as torchserve:
            server = Server(torchserve.inference, torchserve.management, torchserve.key_file)
            load(server, models, console)
            console.print(overview(server.index()))
            console.print(f"inference   {torchserve.inference}", f"management  {torchserve.management}", sep="\n")
            console.print(f"metrics     {torchserve.metrics}/metrics", f"tokens      {torchserve.key_file}", sep="\n")
            console.print(f"logs        {torchserve.log.parent}", "Ctrl-C stops it.", sep="\n", soft_wrap=True)
            status = torchserve.wait()
            console.print(
                f"[red]TorchServe ended by itself with status {status}. Its last words:[/]\n{torchserve.tail()}"
            )
            return 1
    except Stopped:
        console.print("Stopped.")
        return 0
    except (LunaError, SpecError, RuntimeError) as error:
        console.print(f"[red]{error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
