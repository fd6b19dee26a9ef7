"""Where finished runs are kept: one table, in SQLite by default or on a PostgreSQL server that a team shares.

A run is claimed before it starts and stored in one transaction when it ends. Claims carry a lease that a thread of the
store renews: a comparison that is killed leaves claims behind, which others take over when the lease runs out, or at
once when the dead process ran here. All stamps are the database's own time, so that a client's wrong clock harms nobody.

SQLite writes ahead and does not wait for the disk at each commit: a process that is killed at any moment loses nothing
that was stored; a power cut may cost the last few runs, which are then run again, and never the file.
"""

import json
import os
import re
import secrets
import socket
import sqlite3
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from pondera.errors import BadInput

if TYPE_CHECKING:
    from pondera.lab.train import RunSpec

LEASE = 60.0  # seconds a claim lives without a heartbeat
PATIENCE = 300.0  # seconds a server that went away is waited for
LOCKED = 60.0  # seconds a file that another program keeps locked is waited for
GOOD = ("ok", "diverged")  # results for good: other statuses speak of the machine, and another command tries again
VERSION = 2  # of the layout; 1 had no status, no checksum and no table of its own for the version

_T = TypeVar("_T")
_meta = sa.MetaData()
_runs = sa.Table(
    "pondera_runs",
    _meta,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("facts", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),  # who claims it, or who finished it
    sa.Column("beat", sa.Float, nullable=False),  # last sign of life of its claim; 0: not claimed
    sa.Column("result", sa.Text),
    sa.Column("finished", sa.Float),
    sa.Column("executions", sa.Integer, nullable=False),
    sa.Column("status", sa.Text),
    sa.Column("checksum", sa.BigInteger),
)
_layout = sa.Table("pondera_layout", _meta, sa.Column("version", sa.Integer, nullable=False))
_c = _runs.c


class Store:
    """Finished runs by key.

    A run that ended "ok" or "diverged" is finished for good, for everybody. Any other end (out of memory, killed,
    raised, out of time) is a result to the store object that recorded it alone; another command tries that run again.
    A result whose text is damaged counts as not finished: a warning says so once, and it is run again.

    Args:
        url: a file path (SQLite; a disk of this machine), ``sqlite://`` (keeps nothing) or ``postgresql://host/db``.
        fresh: take nothing that was stored before this object was opened, and let it be run and stored anew.
    Raises: BadInput: from every method, when the place cannot be used: it is full, damaged, read-only, no store of
        pondera's, or a server that does not answer (one that was there before is waited for, five minutes).
    """

    def __init__(self, url: str | Path, *, fresh: bool = False):
        self.fresh = fresh
        self.owner = f"{_machine()}/{os.getpid()}/{_process_start(os.getpid())}/{secrets.token_hex(4)}"
        self._claimed: set[str] = set()
        self._failed: dict[str, dict[str, Any]] = {}  # this object's own failures
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._warned = False
        full = _parsed(str(url))
        self._shown = str(url) if "://" not in str(url) else full.render_as_string()
        self._sqlite = full.get_backend_name() == "sqlite"
        self._memory = self._sqlite and full.database in (None, "", ":memory:")
        # SQLite has one writer anyway, and the connection to a database in memory is shared by the threads
        self._lock: AbstractContextManager[Any] = threading.Lock() if self._sqlite else nullcontext()
        self._now = sa.cast(sa.literal_column(_CLOCK[self._sqlite]), sa.Float)
        self._insert: Any = sqlite.insert if self._sqlite else postgresql.insert
        extra: dict[str, Any] = {"poolclass": sa.pool.StaticPool} if self._memory else {}
        try:
            self.engine = sa.create_engine(full, connect_args=_connect_args(full), **extra)
        except ImportError:
            raise BadInput(f"the store {self._shown} needs the extra: pip install 'pondera[postgresql]'") from None
        except (SQLAlchemyError, ValueError, TypeError) as error:
            raise BadInput(f"the store {self._shown} cannot be opened: {_short(error)}") from None
        if self._sqlite:
            sa.event.listen(self.engine, "connect", _sqlite_settings)
            sa.event.listen(self.engine, "begin", _sqlite_begin)
        try:
            self._opened: float = self._do(self._prepare, opening=True)
        except (TypeError, ValueError, OSError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"the store {self._shown} cannot be opened: {_short(error)}") from None

    # -- what a comparison asks ---------------------------------------------------------------------------------------

    def results(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Results of the finished runs among `keys`, this object's own failures included."""
        wanted = list(keys)
        found = {k: self._failed[k] for k in wanted if k in self._failed}
        for at in range(0, len(wanted), 500):
            part = wanted[at : at + 500]
            query = sa.select(_c.key, _c.result, _c.checksum, _c.finished).where(
                _c.key.in_(part), sa.not_(self._undone)
            )
            rows = self._do(lambda c, query=query: c.execute(query).all(), writes=False)
            damaged = []
            for row in rows:
                result = _read(row.result, row.checksum)
                if result is None:
                    damaged.append(row)
                else:
                    found[row.key] = result
            if damaged:
                self._do(lambda c, damaged=damaged: _discard(c, damaged))
                warnings.warn(
                    f"the store {self._shown} holds {len(damaged)} results that cannot be read; they are run again",
                    stacklevel=2,
                )
        return found

    def claim(self, spec: "RunSpec") -> bool:
        """Take a run for this object; False when it is finished or somebody living has it."""
        key = spec.key
        if key in self._failed or key in self._claimed:
            return False
        lapsed = sa.func.abs(_c.beat - self._now) > LEASE  # a beat in the future is no sign of life either
        values = {"key": key, "facts": json.dumps(spec.facts()), "owner": self.owner, "beat": self._now}
        take = self._insert(_runs).values(**values, executions=0)
        take = take.on_conflict_do_update(
            index_elements=[_c.key],
            set_={"owner": self.owner, "beat": self._now},
            where=self._undone & ((_c.beat == 0) | lapsed | (_c.owner == self.owner)),
        ).returning(_c.key)

        def work(c: sa.Connection) -> bool:
            if c.execute(take).first() is not None:
                return True
            other = c.execute(sa.select(_c.owner).where(_c.key == key, self._undone)).scalar()
            if other is None or not _is_dead(other):
                return False
            inherit = sa.update(_runs).where(_c.key == key, _c.owner == other, self._undone)
            return c.execute(inherit.values(owner=self.owner, beat=self._now)).rowcount == 1

        taken = self._do(work)
        if taken:
            self._claimed.add(key)
        if taken and self._heart is None and not self._memory:
            self._heart = threading.Thread(target=self._keep_beating, name="pondera store", daemon=True)
            self._heart.start()
        return taken

    def finish(self, spec: "RunSpec", result: dict[str, Any]) -> None:
        """Store a result and count the execution. The first good result stored for a key stays, unless it is `fresh`."""
        good = result["status"] in GOOD
        text = json.dumps(result)
        if not good:
            self._failed[spec.key] = result
        end = {"result": text, "status": result["status"], "checksum": zlib.crc32(text.encode()), "beat": 0.0}
        end |= {"finished": self._now, "owner": self.owner}
        mine = (_c.owner == self.owner) & (_c.beat > 0)
        put = self._insert(_runs).values(key=spec.key, facts=json.dumps(spec.facts()), executions=1, **end)
        put = put.on_conflict_do_update(
            index_elements=[_c.key],
            set_=end | {"executions": sa.case((_is_good, _c.executions + 1), else_=1)},
            where=(mine | self._undone) if good else mine,
        ).returning(_c.key)
        # another one's good result stays; a second try of the same call finds its own and counts nothing
        count = sa.update(_runs).where(_c.key == spec.key, _c.owner != self.owner, _is_good)

        def work(c: sa.Connection) -> None:
            if c.execute(put).first() is None and good:
                c.execute(count.values(executions=_c.executions + 1))

        self._do(work)
        self._claimed.discard(spec.key)

    def beat(self) -> None:
        """Renew this object's claims; a thread does so from the first claim on."""
        renew = sa.update(_runs).where(_c.owner == self.owner, _c.beat > 0).values(beat=self._now)
        self._do(lambda c: c.execute(renew))

    def release(self) -> None:
        """Give back what this object claimed and did not finish; where that fails, the lease does it in its time."""
        mine = (_c.owner == self.owner) & (_c.beat > 0)

        def work(c: sa.Connection) -> None:
            c.execute(sa.delete(_runs).where(mine, _c.result.is_(None)))
            c.execute(sa.update(_runs).where(mine).values(beat=0.0))

        try:
            self._do(work, patience=2.0)
        except BadInput:
            pass
        self._claimed.clear()

    def executions(self) -> dict[str, int]:
        """How often each run that is finished for good was carried out to its end (1 each, when nothing is repeated)."""
        query = sa.select(_c.key, _c.executions).where(_is_good)
        return {row.key: row.executions for row in self._do(lambda c: c.execute(query).all(), writes=False)}

    def close(self) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join(2.0)
        self.engine.dispose()

    # -- how it is done -----------------------------------------------------------------------------------------------

    @property
    def _undone(self) -> sa.ColumnElement[bool]:
        """Whether a row has no result that this object may take."""
        undone: sa.ColumnElement[bool] = sa.not_(_is_good)
        if self.fresh:
            undone = undone | (sa.func.coalesce(_c.finished, 0.0) <= self._opened)
        return undone

    def _keep_beating(self) -> None:
        while not self._stop.wait(LEASE / 6):
            try:
                self.beat()
            except BadInput:
                pass  # the comparison meets the same trouble and says so; a server may come back

    def _do(
        self, work: Callable[[sa.Connection], _T], *, writes: bool = True, opening: bool = False, patience: float = 0.0
    ) -> _T:
        """Carry out `work` in one transaction; again, while the file is locked or the server away."""
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                with self._lock, self._transaction(writes) as c:
                    return work(c)
            except (SQLAlchemyError, sqlite3.Error) as error:
                reason = _short(error)
                if not self._may_pass(error, reason, opening):
                    raise BadInput(f"the store {self._shown} cannot be used: {_advice(error, reason)}") from None
            waited = time.monotonic() - began
            if waited > (patience or (LOCKED if self._sqlite else PATIENCE)):
                what = "another program keeps it locked" if self._sqlite else f"its server has gone ({reason})"
                raise BadInput(
                    f"the store {self._shown} cannot be used: {what}, for {waited:.0f} seconds now; "
                    "see to it and give the same command again, what is finished is kept"
                )
            if waited > 2 and not self._warned and not patience:
                self._warned = True
                warnings.warn(f"the store {self._shown} does not answer ({reason}); waiting for it", stacklevel=3)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    @contextmanager
    def _transaction(self, writes: bool) -> Iterator[sa.Connection]:
        with self.engine.connect() as c:
            c = c.execution_options(pondera_writes=writes)
            with c.begin():
                yield c

    def _may_pass(self, error: Exception, reason: str, opening: bool) -> bool:
        if self._sqlite:
            return "locked" in reason
        if opening:  # a wrong address is said at once
            return "starting up" in reason or "shutting down" in reason
        lost = isinstance(error, OperationalError | InterfaceError) or getattr(error, "connection_invalidated", False)
        return lost and _state(error) not in ("53100", "58030")

    def _prepare(self, c: sa.Connection) -> float:
        """Make or check the tables, and bring an older layout to this one; returns the database's time."""
        if not self._sqlite:
            c.execute(sa.text("select pg_advisory_xact_lock(7766376)"))  # one at a time
        there = sa.inspect(c).get_table_names()
        if _runs.name not in there:
            _meta.create_all(c)
            c.execute(sa.delete(_layout))
            c.execute(sa.insert(_layout).values(version=VERSION))
        version = 1
        if _layout.name in sa.inspect(c).get_table_names():
            version = c.execute(sa.select(sa.func.max(_layout.c.version))).scalar() or 1
        if version > VERSION:
            raise BadInput(
                f"the store {self._shown} was written by a newer pondera (layout {version}, this one knows {VERSION}); "
                "update pondera, or name another store"
            )
        if version == 1:
            _migrate(c)
        c.execute(sa.select(_runs).limit(0))  # fails here if the table is another's
        c.execute(sa.update(_runs).where(_c.key == "").values(beat=0.0))  # fails here if read-only
        return float(c.execute(sa.select(self._now)).scalar_one())


_is_good = sa.func.coalesce(_c.status, "").in_(GOOD)
_CLOCK = {  # by: is it SQLite; seconds since 1970
    True: "(julianday('now') - 2440587.5) * 86400.0",
    False: "extract(epoch from clock_timestamp())",
}


def _migrate(c: sa.Connection) -> None:
    """From layout 1: failures were finished for good there, and a finished row kept its last beat."""
    c.execute(sa.select(_c.key, _c.facts, _c.owner, _c.beat, _c.result, _c.finished, _c.executions).limit(0))
    c.execute(sa.text("alter table pondera_runs add column status text"))
    c.execute(sa.text("alter table pondera_runs add column checksum bigint"))
    _layout.create(c)
    c.execute(sa.insert(_layout).values(version=VERSION))
    set_one = sa.update(_runs).where(_c.key == sa.bindparam("k"))
    set_one = set_one.values(status=sa.bindparam("s"), checksum=sa.bindparam("n"), beat=0.0)
    last = ""
    while True:
        page = sa.select(_c.key, _c.result).where(_c.key > last, _c.result.is_not(None)).order_by(_c.key).limit(500)
        rows = c.execute(page).all()
        if not rows:
            return
        found = [(k, text, _read(text, None)) for k, text in rows]
        c.execute(
            set_one, [{"k": k, "s": r["status"] if r else "cut", "n": zlib.crc32(t.encode())} for k, t, r in found]
        )
        last = rows[-1].key


def _read(text: str, checksum: int | None) -> dict[str, Any] | None:
    """A stored result; None when its text is not what was stored."""
    if checksum is not None and zlib.crc32(text.encode()) != checksum:
        return None
    try:
        result = json.loads(text)
    except ValueError:
        return None
    return result if isinstance(result, dict) and isinstance(result.get("status"), str) else None


def _discard(c: sa.Connection, rows: list[Any]) -> None:
    for row in rows:
        c.execute(
            sa.update(_runs)
            .where(_c.key == row.key, _c.finished.is_not_distinct_from(row.finished))
            .values(status="cut", beat=0.0)
        )


# -- places -----------------------------------------------------------------------------------------------------------


def _parsed(url: str) -> sa.URL:
    """The SQLAlchemy URL of a path or URL; BadInput when there can be no store."""
    if "://" not in url:
        path = Path(url).absolute()
        if path.is_dir():
            raise BadInput(f"the store {url} is a folder; it must be a file or a database URL")
        if not path.parent.is_dir():
            raise BadInput(f"the store {url} cannot be made: the folder {path.parent} does not exist")
        return sa.URL.create("sqlite", database=str(path))
    shown = re.sub(r"://[^@/]*@", "://***@", url)
    try:
        full = sa.make_url(url)
    except (SQLAlchemyError, ValueError) as error:
        raise BadInput(
            f"the store {shown} is no database URL ({_short(error)}); postgresql://host:5432/name is one"
        ) from None
    if full.drivername in ("postgresql", "postgres"):
        full = full.set(drivername="postgresql+psycopg")
    if full.get_backend_name() not in ("sqlite", "postgresql"):
        raise BadInput(f"a store is a file, sqlite:// or postgresql://, got {shown}")
    return full


def _connect_args(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        # the wait for a lock is short, so that Ctrl-C is not kept waiting; `_do` tries again
        return {"timeout": 1.0, "check_same_thread": False}
    # a server that vanished without a word is noticed within half a minute
    known = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return {k: v for k, v in (known | {"tcp_user_timeout": 30_000}).items() if k not in url.query}


def _sqlite_settings(connection: Any, _: Any) -> None:
    connection.isolation_level = (
        None  # transactions begin where `_sqlite_begin` says, and hold the schema's changes too
    )
    connection.text_factory = lambda data: data.decode(errors="replace")  # a flipped bit is for the checksum to find
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _sqlite_begin(connection: sa.Connection) -> None:
    # a writer takes its place at once: one that reads first may find the file changed when it comes to write
    writes = connection.get_execution_options().get("pondera_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _advice(error: Exception, reason: str) -> str:
    """What is wrong with the place, and what to do about it."""
    text, state = reason.lower(), _state(error)
    if "is full" in text or state == "53100":
        return "its disk is full; make room and give the same command again, what is finished is kept"
    if "disk i/o error" in text or state == "58030":
        return f"{reason}; see that its disk has room and is sound, and give the same command again"
    if any(w in text for w in ("malformed", "corrupt", "unsupported file format")) or state in ("XX001", "XX002"):
        return (
            f"it is damaged ({reason}); move it away, or save what can be read with "
            "`sqlite3 OLD .recover | sqlite3 NEW`, and give the same command again"
        )
    if "not a database" in text:
        return f"{reason}, or no longer; name another one"
    if "readonly" in text or "read-only" in text or state == "25006":
        return "it is read-only; make it writable, or name another one"
    if "unable to open" in text:
        return f"{reason}; see that its folder may be written"
    strange = ("no such", "no column", "already exists", "duplicate column")
    if any(w in text for w in strange) or state in ("42P01", "42703", "42P07"):
        return f"its table pondera_runs is not of pondera's layout ({reason}); name another one"
    return reason


def _state(error: Exception) -> str:
    """PostgreSQL's own code for an error, '' without."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _short(error: BaseException) -> str:
    text = str(getattr(error, "orig", None) or error)
    return " ".join(text.split())[:300]


# -- owners -----------------------------------------------------------------------------------------------------------


def _machine() -> str:
    """A name for the place whose process numbers mean the same: containers may share a host's name, and not these."""
    marks = []
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            marks.append(read())
        except OSError:
            pass
    return f"{socket.gethostname()}-{zlib.crc32(''.join(marks).encode()):08x}"


def _process_start(pid: int) -> str:
    """When a living process began, in clock ticks since boot; '' where there is none or the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else stat[19]


def _is_dead(owner: str) -> bool:
    """Whether the owner was a process on this machine that is gone (its number may have been given to another)."""
    parts = owner.split("/")
    if len(parts) != 4 or parts[0] != _machine() or not parts[1].isdigit() or not parts[2]:
        return False
    return _process_start(int(parts[1])) != parts[2]
