"""Which models a person means by a name."""

from collections.abc import Callable
from pathlib import PurePosixPath

from luna_protocol.errors import NotFound
from luna_protocol.messages import Index, ServedModel
from luna_protocol.model_names import checkpoint_of

# What a name may mean, the narrowest first.
_MEANINGS: tuple[Callable[[ServedModel], set[str]], ...] = (
    lambda model: {model.name},
    lambda model: {model.name.partition("/")[0], checkpoint_of(model.name)},
    lambda model: {model.checkpoint or model.name},
    lambda model: {_file(model).name, _file(model).stem},
)


def named(index: Index, names: list[str]) -> list[str]:
    """The models that the names stand for.

    Raises:
        NotFound: the store has no such model or checkpoint, or several files are called so.
    """
    chosen = [model.name for name in names for model in _meant(index, name.replace("\\", "/"))]
    return list(dict.fromkeys(chosen))


def _file(model: ServedModel) -> PurePosixPath:
    return PurePosixPath(model.checkpoint or model.name)


def _meant(index: Index, name: str) -> list[ServedModel]:
    for meaning in _MEANINGS:
        if models := [model for model in index.models if name in meaning(model)]:
            break
    else:
        known = ", ".join(model.name for model in index.models)
        raise NotFound(f"the store has no {name!r}", f"it has {known or 'nothing'}")
    files = {model.checkpoint for model in models}
    if meaning is _MEANINGS[-1] and len(files) > 1:
        raise NotFound(f"{name!r} could be {' or '.join(sorted(files))}", "give the folder too")
    return models
