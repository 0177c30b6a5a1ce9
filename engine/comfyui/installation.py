"""Which ComfyUI an engine runs the code of: what serve.py --comfyui sets in the environment for all processes."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from luna_protocol.errors import Broken


@dataclass(frozen=True)
class Installation:
    """A ComfyUI.

    Attributes:
        folder: holds main.py.
        python: the interpreter that runs it.
        arguments: command line arguments of its main.py that decide how it computes, such as
            --use-pytorch-cross-attention; pictures are equal to those of a ComfyUI that was started with the same.
    """

    folder: Path
    python: Path
    arguments: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Installation | None":
        """What LUNA_COMFYUI, LUNA_COMFYUI_PYTHON and LUNA_COMFYUI_ARGUMENTS name; None without the second: model
        folders alone do not make a ComfyUI the engine.

        Raises:
            Broken: the first is missing.
        """
        python = variables.get("LUNA_COMFYUI_PYTHON")
        if not python:
            return None
        arguments = tuple(shlex.split(variables.get("LUNA_COMFYUI_ARGUMENTS", "")))
        if not (folder := variables.get("LUNA_COMFYUI")):
            raise Broken("LUNA_COMFYUI_PYTHON is set, and LUNA_COMFYUI is not", "set both, or start by serve.py --comfyui")
        return cls(Path(folder), Path(python), arguments)

    def begin(self, on_cpu: bool) -> str:
        """Makes `comfy` importable in this process, once, with the arguments in force; returns ComfyUI's version.

        Raises:
            Broken: it cannot be imported, or does not know an argument.
        """
        before = sys.argv
        sys.path.insert(0, str(self.folder))
        sys.argv = ["main.py", *(["--cpu"] if on_cpu else []), *self.arguments]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args  # noqa: F401  reads sys.argv
            import comfy.sd  # noqa: F401
            from comfyui_version import __version__
        except SystemExit:
            raise Broken(
                f"ComfyUI does not take the arguments {' '.join(self.arguments)!r}",
                f"{self.python} {self.folder / 'main.py'} --help lists them",
            ) from None
        except ImportError as error:
            raise Broken(
                f"the ComfyUI in {self.folder} cannot be imported by {self.python}: {error}",
                "does it start with this interpreter by itself?",
            ) from error
        finally:
            sys.argv = before
        return __version__
