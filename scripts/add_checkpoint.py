"""Pack checkpoints into the model store and, where the server is running, have them served at once.

Family and parts are found from the file's header; the weights stay where they are.
"""

import _environment

_environment.ensure()

import argparse
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from engine.roots import Roots, find
from luna_client.manager import Manager
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.model_names import FIRST_VERSION, with_version
from serving.archives import Archive, pack_checkpoint, pack_repository
from serving.loading import load, overview
from serving.replacing import replace
from serving.specs import SpecError
from serving.torchserve import ROOT


def main() -> int:
    console = Console()
    try:
        roots = Roots.from_environment(ROOT)
    except LunaError as error:
        console.print(f"[red]{escape(str(error))}")
        return 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a .safetensors file that ComfyUI reads, or a name below the model folders",
    )
    parser.add_argument("--version", default=FIRST_VERSION, help="to serve beside others of the name (%(default)s)")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="look for names in this ComfyUI's folders too")
    parser.add_argument("--name", help="what the models are called before the dot, instead of the file's name")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="what to compute in, instead of the specs' choice"
    )
    parser.add_argument("--store", type=Path, default=roots.model_store, help="(%(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="of the running server, as given to serve.py (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.name and len(arguments.files) > 1:
        parser.error("--name names one file's models; add the files one by one")
    if not re.fullmatch(r"\d+(\.\d+)*", arguments.version):
        parser.error(f"--version {arguments.version!r} is no version; give a number such as 2.0")
    if arguments.comfyui:
        os.environ["LUNA_COMFYUI"] = str(arguments.comfyui)
    archives: list[Archive] = []
    status = 0
    for file in arguments.files:
        try:
            path = Path(file)
            if not path.is_file() and not path.is_absolute():
                path = find(Roots.from_environment(ROOT).checkpoints, file, "checkpoint")
            archives += pack_checkpoint(
                path, arguments.store, arguments.name, arguments.dtype, version=arguments.version
            )
        except (LunaError, SpecError) as error:
            console.print(f"[red]{_printable(file)}: {_printable(str(error))}")
            status = 1
    for archive in archives:
        done = "packed" if archive.written else "already there"
        size = f"{archive.path.stat().st_size / 1024:.0f} KiB"
        instead = f", in place of {archive.replaced}" if archive.replaced else ""
        console.print(f"{archive.model:30} {done}, {size}, for {_printable(archive.handler['checkpoint'] + instead)}")
    if not archives:
        return 1
    pack_repository(arguments.store)
    host = "http://127.0.0.1"
    server = Manager(f"{host}:{arguments.port}", f"{host}:{arguments.port + 1}")
    try:
        if not server.ping():
            console.print(f"No server at {server.inference}: scripts/serve.py will serve them.")
            return status
        return _serve(server, archives, console) or status
    except LunaError as error:
        console.print(f"[red]{_printable(str(error))}")
        return 1


def _printable(text: str) -> str:
    """As rich prints it: brackets are no markup, and what is no UTF-8 is spelt out."""
    return escape(text.encode("utf-8", "backslashreplace").decode())


def _serve(server: Manager, archives: list[Archive], console: Console) -> int:
    replaced = True
    for archive in archives:
        if archive.written:
            try:
                with suppress(NotFound), console.status(f"{archive.model}: waiting for the requests that run"):
                    replace(server, archive.model)
            except LunaError as error:
                console.print(f"[red]{archive.model} stays as it was until the next start: {_printable(str(error))}")
                replaced = False
    load(server, [archive.model for archive in archives], console)
    models = {with_version(archive.model) for archive in archives}
    index = server.index()
    index.models = [model for model in index.models if with_version(model.name) in models]
    console.print(overview(index))
    ready = [model for model in index.models if any(worker.state == "ready" for worker in model.workers)]
    return 0 if replaced and len(ready) == len(models) else 1


if __name__ == "__main__":
    sys.exit(main())
