"""What the models of a store are called: NAME, or NAME/VERSION for versions after the first, as TorchServe's addresses
have them. To TorchServe itself a plain NAME is whichever version is the default."""

import re

FIRST_VERSION = "1.0"
_MODEL = re.compile(r"(?P<checkpoint>.+)\.(?P<role>unet|clip|vae)(?:\.\d+)?(?:/.+)?")


def checkpoint_of(model: str) -> str:
    """What a model shares with the other parts, replicas and versions of its checkpoint: "X" for "X.unet.1/2.0"."""
    match = _MODEL.fullmatch(model)
    return match["checkpoint"] if match else model


def role_of(model: str) -> str:
    """ "unet" for "X.unet.1/2.0"; the name itself for a model that is no checkpoint's, such as "repository"."""
    match = _MODEL.fullmatch(model)
    return match["role"] if match else model


def first_replica(model: str) -> str:
    """ "X.unet/2.0" for "X.unet.1/2.0"."""
    return re.sub(r"(\.(?:unet|clip|vae))\.\d+(?=/|$)", r"\1", model)


def with_version(model: str) -> str:
    """The name that means the same whichever version is the default: "X.unet/1.0" for "X.unet"."""
    return model if "/" in model else f"{model}/{FIRST_VERSION}"


def without_first(model: str) -> str:
    """The name that a model has while it is the only version: "X.unet" for "X.unet/1.0"."""
    return model.removesuffix(f"/{FIRST_VERSION}")


def archive_name(model: str) -> str:
    """The file of the store: X.unet.mar for "X.unet" and "X.unet/1.0", X.unet@2.0.mar for "X.unet/2.0"."""
    return f"{without_first(model).replace('/', '@')}.mar"
