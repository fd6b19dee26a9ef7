"""Where finished runs are kept: one table, in SQLite by default or on a PostgreSQL server that a team shares.

A run is claimed before it starts and stored in one transaction when it ends. Claims carry a lease: a comparison that is
killed leaves claims behind, which others take over when the lease runs out, or at once when the dead process ran here.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, SQLAlchemyError

from pondera.errors import BadInput
from pondera.lab.train import RunSpec

LEASE = 60.0  # seconds a claim lives without a heartbeat

_meta = sa.MetaData()
_runs = sa.Table(
    "pondera_runs",
    _meta,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("beat", sa.Float, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("finished", sa.Float),
    sa.Column("executions", sa.Integer, nullable=False, default=0),
)


class Store:
    """Finished runs by key. `url`: a file path (SQLite), or any SQLAlchemy URL: ``postgresql+psycopg://host/db``.

    Raises: BadInput: when the place cannot be written, is not a store, or the server does not answer.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        self.owner = f"{socket.gethostname()}/{os.getpid()}/{_process_start(os.getpid())}/{secrets.token_hex(4)}"
        memory = self.url in ("sqlite://", "sqlite:///:memory:")
        if "://" not in self.url:
            path = Path(self.url)
            if path.is_dir():
                raise BadInput(f"the store {self.url} is a folder; it must be a file or a database URL")
            if not path.absolute().parent.is_dir():
                raise BadInput(
                    f"the store {self.url} cannot be made: the folder {path.absolute().parent} does not exist"
                )
            full = f"sqlite:///{path.absolute()}"
        else:
            full = self.url.replace("postgresql://", "postgresql+psycopg://", 1)
        try:
            extra: dict[str, Any] = {"poolclass": sa.pool.StaticPool} if memory else {}
            if full.startswith("sqlite"):
                extra["connect_args"] = {"timeout": 60, "check_same_thread": False}
            self.engine = sa.create_engine(full, pool_pre_ping=True, **extra)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise BadInput(f"the store {self._shown} cannot be opened: {_short(error)}") from None
        if full.startswith("sqlite") and not memory:
            sa.event.listen(self.engine, "connect", _sqlite_settings)
        try:
            for attempt in range(5):  # two comparisons may both find no table and both make it
                try:
                    _meta.create_all(self.engine)
                    break
                except (IntegrityError, OperationalError, sa.exc.ProgrammingError) as error:
                    if attempt == 4 or not any(w in str(error) for w in ("already exists", "duplicate", "locked")):
                        raise
                    time.sleep(0.2)
            with self.engine.begin() as c:
                c.execute(sa.select(sa.func.count()).select_from(_runs)).scalar()
                c.execute(sa.update(_runs).where(_runs.c.key == "").values(beat=0.0))  # fails here if read-only
        except (DatabaseError, OSError) as error:
            raise BadInput(f"the store {self._shown} cannot be used: {_short(error)}") from None

    @property
    def _shown(self) -> str:
        return sa.engine.make_url(self.url).render_as_string() if "://" in self.url else self.url

    def results(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Results of the finished runs among `keys`."""
        wanted, found = list(keys), {}
        with self.engine.connect() as c:
            for at in range(0, len(wanted), 500):
                part = wanted[at : at + 500]
                query = sa.select(_runs.c.key, _runs.c.result).where(_runs.c.key.in_(part), _runs.c.result.is_not(None))
                found.update({k: json.loads(r) for k, r in c.execute(query)})
        return found

    def claim(self, spec: RunSpec) -> bool:
        """Take a run for this process; False when it is finished or somebody living has it."""
        now = time.time()
        try:
            with self.engine.begin() as c:
                c.execute(
                    sa.insert(_runs).values(
                        key=spec.key, facts=json.dumps(spec.facts()), owner=self.owner, beat=now, executions=0
                    )
                )
            return True
        except IntegrityError:
            pass
        with self.engine.begin() as c:
            row = c.execute(
                sa.select(_runs.c.owner, _runs.c.beat, _runs.c.result).where(_runs.c.key == spec.key)
            ).one_or_none()
            if row is None or row.result is not None or not (row.beat < now - LEASE or _is_dead(row.owner)):
                return False
            taken = c.execute(
                sa.update(_runs)
                .where(
                    _runs.c.key == spec.key,
                    _runs.c.owner == row.owner,
                    _runs.c.beat == row.beat,
                    _runs.c.result.is_(None),
                )
                .values(owner=self.owner, beat=now)
            )
            return taken.rowcount == 1

    def beat(self) -> None:
        """Renew this process's claims."""
        with self.engine.begin() as c:
            c.execute(
                sa.update(_runs).where(_runs.c.owner == self.owner, _runs.c.result.is_(None)).values(beat=time.time())
            )

    def finish(self, spec: RunSpec, result: dict[str, Any]) -> None:
        """Store a result and count the execution; the first result stored for a key stays."""
        this = _runs.c.key == spec.key
        with self.engine.begin() as c:
            c.execute(sa.update(_runs).where(this).values(executions=_runs.c.executions + 1))
            c.execute(
                sa.update(_runs)
                .where(this, _runs.c.result.is_(None))
                .values(result=json.dumps(result), finished=time.time(), owner=self.owner)
            )

    def release(self) -> None:
        """Give back what this process claimed and did not finish."""
        with self.engine.begin() as c:
            c.execute(sa.delete(_runs).where(_runs.c.owner == self.owner, _runs.c.result.is_(None)))

    def executions(self) -> dict[str, int]:
        """How often each finished run was carried out to its end (1 each, when nothing is repeated)."""
        with self.engine.connect() as c:
            query = sa.select(_runs.c.key, _runs.c.executions).where(_runs.c.result.is_not(None))
            return {row.key: row.executions for row in c.execute(query)}

    def close(self) -> None:
        self.engine.dispose()


def _sqlite_settings(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot; '' where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_dead(owner: str) -> bool:
    """Whether the owner was a process on this machine that is gone (its number may have been given to another)."""
    host, pid, began, _ = owner.split("/")
    if host != socket.gethostname() or not began:
        return False
    return _process_start(int(pid)) != began


def _short(error: BaseException) -> str:
    text = str(getattr(error, "orig", None) or error)
    return " ".join(text.split())[:300]
