"""Databases by URL; SQLite is opened so that several processes share it and what it committed survives a power cut."""

import sqlite3
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, MetaData, create_engine, event
from sqlalchemy.exc import DBAPIError


def open_database(url: str, schema: MetaData) -> Engine:
    """An engine for `url` that has the tables of `schema`; connections of its execution option `reading` only read. An
    SQLite file that is new, and so what SQLite writes beside it, is its user's alone."""
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        if engine.url.database and not engine.url.database.startswith((":memory:", "file:")):
            # Never opened and closed where it is there: that would end the locks which this process holds on it.
            with suppress(FileExistsError):
                Path(engine.url.database).touch(0o600, exist_ok=False)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        schema.create_all(engine)
    except DBAPIError:
        # Another process may be making them just now.
        schema.create_all(engine)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Transactions are begun below: sqlite3's own begin late, and then fail instead of waiting for each other.
    connection.isolation_level = None
    for pragma in (
        "busy_timeout = 60000",
        # Pages of 16 KiB write a latent of 1 MB in half the time of the default's 4 KiB.
        "page_size = 16384",
        "auto_vacuum = INCREMENTAL",
        "journal_mode = WAL",
        # FULL: WAL's usual NORMAL may forget the last transactions when the power fails.
        "synchronous = FULL",
        "journal_size_limit = 67108864",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def tidy(engine: Engine) -> None:
    """Gives the disk the space back that finished jobs have left in SQLite's files; PostgreSQL does so by itself."""
    if engine.dialect.name == "sqlite":
        with engine.execution_options(reading=True).connect() as db:
            # As a script: executed otherwise, sqlite3 ends it after one page. It commits what SQLAlchemy has begun.
            script = "PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(PASSIVE);"
            db.connection.driver_connection.executescript(script)
