"""Python reads this when one of TorchServe's workers starts, as the folder is on its PYTHONPATH (see torchserve.py).

A worker imports torch, for `isinstance(value, torch.Tensor)` alone: 230 MB and a second and a half in each, where ours
only hand bytes on. That one module gets a torch without tensors; all others get the real one when they ask for it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

_ASKS_FOR_TORCH = "ts.protocol.otf_message_handler"


class _WithoutTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _ASKS_FOR_TORCH or "torch" in sys.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            sys.modules["torch"] = types.SimpleNamespace(Tensor=type("NoTensor", (), {}))
            try:
                execute(module)
            finally:
                del sys.modules["torch"]

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WithoutTorch())
