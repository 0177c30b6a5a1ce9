"""What workers do not import: it would take longer than all that they do."""

import subprocess
import sys

from serving.torchserve import ROOT

SCRIPT = """
import sys
import engine.roles.unet, engine.roles.vae
print([name for name in ("transformers", "torch._dynamo") if name in sys.modules])
import torch, transformers
print(torch.compiler.disable(len) is not len)
"""


def test_unet_and_vae_come_without_transformers_and_the_compiler_and_leave_them_to_others():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr
