"""What the models of a checkpoint are called: TorchServe takes ASCII letters, digits, "_", "." and "-" in their names.

People see the file's own name everywhere; a model's name is what commands and addresses use. It follows from the file's
name alone, so that it is the same at every start, and what cannot be spelt is told apart by a short hash.
"""

import hashlib
import re

_LONGEST = 120  # of a name without its hash; file systems take 255 bytes for a whole archive's


def model_name(name: str) -> str:
    """A checkpoint's model name: characters that cannot be spelt become underscores, and lost letters add a hash.

    "my model (2)" is "my_model__2_"; of a name in another script, the ASCII letters and digits remain beside the hash.
    """
    kept = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-")
    if name.isascii() and 0 < len(kept) <= _LONGEST:
        return kept
    return hashed_name(kept, name)


def hashed_name(name: str, real: str) -> str:
    """`name`, cut and tidied, and 8 digits that only the text `real` has."""
    digits = hashlib.blake2b(real.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    readable = re.sub(r"_{2,}", "_", name[:_LONGEST]).strip("_.-")
    return f"{readable or 'model'}-{digits}"
