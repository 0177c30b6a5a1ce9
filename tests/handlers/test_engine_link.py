"""Where an engine's code comes from: a copy, as an archive's own folder goes with its model."""

from handlers.engine_link import CODE, copied_code


def test_the_copy_is_whole_and_made_once(tmp_path) -> None:
    folder = copied_code(tmp_path / "code" / "digest")
    for package in ("engine", "handlers", "luna_pictures", "luna_protocol"):
        ours = {file.relative_to(CODE): file.read_bytes() for file in (CODE / package).rglob("*.py")}
        assert ours and {path: (folder / path).read_bytes() for path in ours} == ours
    (folder / "kept").touch()
    assert copied_code(folder) == folder and (folder / "kept").exists()
    assert not list(tmp_path.rglob("*.part"))
