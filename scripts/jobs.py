"""List, retry, cancel and purge the decode jobs of a running server.

A job that failed for good is dead: it keeps its latents, so that it can be tried again once its reason is gone. Without
IDs, retry takes all dead jobs and purge all of a state. Pictures stay whatever is purged.
"""

import _environment

_environment.ensure()

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from luna_client.manager import Manager
from luna_protocol.errors import LunaError
from luna_protocol.messages import Request, validate
from luna_protocol.save_job import CancelJobs, JobsChanged, PurgeJobs, QueueReport, QueueStatus, RetryJobs

ENDED = ["dead", "done", "cancelled"]
STATES = ["queued", "running", *ENDED]
PAST = {"retry": "queued again", "cancel": "cancelled", "purge": "forgotten"}
AT_ONCE = 256  # as many jobs as one request may name


def overview(report: QueueReport) -> Table:
    """One row a job, the newest last."""
    table = Table("job", "client", "state", "tries", "first file", "reason")
    for job in reversed(report.jobs):
        table.add_row(
            job.job_id, job.client, job.state, str(job.attempts), job.files[0].path if job.files else "", job.reason
        )
    return table


def requests(command: str, ids: list[str], state: str | None) -> Iterator[Request]:
    """What the command asks of the server.

    Raises:
        Malformed, Impossible: an id that no job can have.
    """
    kind = {"retry": RetryJobs, "cancel": CancelJobs, "purge": PurgeJobs}[command]
    fields = {"states": [state] if state else ENDED} if command == "purge" and (state or ids) else {}
    for start in range(0, max(len(ids), 1), AT_ONCE):
        yield validate(kind, fields | {"job_ids": ids[start : start + AT_ONCE]})


def change(server: Manager, asked: Iterator[Request], command: str, console: Console) -> int:
    """Shows what became of the jobs; 1 if one of those named was not changed."""
    replies = [validate(JobsChanged, server.ask(request)) for request in asked]
    unchanged = [item for reply in replies for item in reply.unchanged.items()]
    for job_id, reason in unchanged:
        console.print(f"[red]{job_id}: {reason}")
    console.print(f"{PAST[command]}: {sum(len(reply.changed) for reply in replies)}")
    return 1 if unchanged else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="of the server, as given to serve.py (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the newest jobs, and how many there are")
    listing.add_argument("--state", choices=STATES, help="only jobs in this state")
    listing.add_argument(
        "--limit", type=int, default=50, metavar="N", help="most jobs to show, up to 1000 (%(default)s)"
    )
    commands.add_parser("retry", help="queue dead jobs again").add_argument("ids", nargs="*", metavar="ID")
    commands.add_parser("cancel", help="end waiting jobs without files").add_argument("ids", nargs="+", metavar="ID")
    purge = commands.add_parser("purge", help="forget jobs that ended; without ID and --state, the done and cancelled")
    purge.add_argument("ids", nargs="*", metavar="ID")
    purge.add_argument("--state", choices=ENDED, help="only jobs in this state")
    arguments = parser.parse_args()
    console = Console()
    host = "http://127.0.0.1"
    server = Manager(f"{host}:{arguments.port}", f"{host}:{arguments.port + 1}")
    try:
        if arguments.command == "list":
            states = [arguments.state] if arguments.state else []
            asked = validate(QueueStatus, {"states": states, "limit": arguments.limit})
            report = validate(QueueReport, server.ask(asked))
            console.print(overview(report))
            console.print(", ".join(f"{report.counts[state]} {state}" for state in STATES))
            return 0
        asked = requests(arguments.command, arguments.ids, getattr(arguments, "state", None))
        return change(server, asked, arguments.command, console)
    except LunaError as error:
        console.print(f"[red]{error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
