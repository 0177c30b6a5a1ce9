"""The tables of the decode queue."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

SCHEMA = MetaData()
# Of these tables. A spool without one is of a LunaServe before there were versions, whose tables were the first's.
VERSION = 1
VERSIONS = Table("luna_spool_versions", SCHEMA, Column("version", Integer, primary_key=True))
_Number = BigInteger().with_variant(Integer, "sqlite")

JOBS = Table(
    "luna_jobs",
    SCHEMA,
    Column("number", _Number, primary_key=True),
    Column("job_id", String(64), nullable=False, unique=True),
    # Which VAE decodes it.
    Column("model", String(255), nullable=False),
    Column("client", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(9), nullable=False, default="queued"),
    Column("staged", Boolean, nullable=False, default=False),
    Column("owner", String(16)),
    Column("claim", Integer, nullable=False, default=0),
    Column("lease_until", Double, nullable=False, default=0.0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Double, nullable=False, default=0.0),
    Column("reason", Text, nullable=False, default=""),
    Column("bytes", BigInteger, nullable=False),
    Column("digest", String(32), nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("submitted", Double, nullable=False),
    Column("finished", Double),
    Column("seconds", Double),
    Index("luna_jobs_order", "state", "model", "priority", "number"),
    Index("luna_jobs_held", "state", "bytes"),
    # A number that was purged must not name another job: an owner that slept through the purge would take it for its
    # own.
    sqlite_autoincrement=True,
)
# A client's next job: found at once, however many wait behind it.
Index(
    "luna_jobs_next",
    *(JOBS.c.state, JOBS.c.model, JOBS.c.client),
    *(JOBS.c.staged.desc(), JOBS.c.priority.desc(), JOBS.c.number),
)
# Jobs that a VAE has yet to decode; their tensors are what `Limits.bytes` bounds.
WAITS = JOBS.c.state.in_(("queued", "running"))
# Apart from the jobs, so that changing a row does not rewrite megabytes.
PAYLOADS = Table(
    "luna_payloads",
    SCHEMA,
    Column("number", ForeignKey(JOBS.c.number, ondelete="CASCADE"), primary_key=True),
    Column("blob", LargeBinary, nullable=False),
)
FILES = Table(
    "luna_files",
    SCHEMA,
    Column("number", ForeignKey(JOBS.c.number, ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("kind", String(8), nullable=False),
    # Which group of the job and which row of its batch a picture is.
    Column("group", Integer, nullable=False),
    Column("row", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("path_key", Text, nullable=False, unique=True),
    Column("wanted_key", Text, nullable=False, index=True),
    Column("suffix", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("part", Text),
    Column("sha256", String(64)),
    Column("bytes", BigInteger),
    Column("discarded", Boolean, nullable=False, default=False),
    Column("quality", Double),
    Column("thumbnail", LargeBinary),
)
TURNS = Table(
    "luna_turns",
    SCHEMA,
    Column("client", String(64), primary_key=True),
    Column("turn", BigInteger, nullable=False),
)
