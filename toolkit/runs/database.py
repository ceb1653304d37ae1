"""The table `runs`, by SQLAlchemy Core: SQLite by default, PostgreSQL (or others) by URL."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

from toolkit.errors import RunError
from toolkit.runs.status import RunRecord

_BUSY_SECONDS = 3
"""How long to wait for another process's transaction in SQLite; they take milliseconds."""

_TYPES: dict[type, Any] = {str: sa.String(1024), int: sa.BigInteger, float: sa.Float}


def _column(field: msgspec.structs.FieldInfo) -> sa.Column[Any]:
    kind, *others = get_args(field.type) or (field.type,)
    is_key = field.name == "folder"
    return sa.Column(field.name, _TYPES[kind], primary_key=is_key, nullable=bool(others))


metadata = sa.MetaData()
runs_table = sa.Table("runs", metadata, *map(_column, msgspec.structs.fields(RunRecord)))


def check_url(url: str) -> None:
    """Raise RunError where `url` can never be a registry; no server is asked."""
    known = "write sqlite:////absolute/path.sqlite or postgresql+psycopg://USER@HOST/NAME"
    try:
        parsed = sa.make_url(url)
        parsed.get_dialect().import_dbapi()
    except sa.exc.NoSuchModuleError:
        problem = f"no such kind of database: {parsed.drivername}; {known}"
    except (sa.exc.ArgumentError, ValueError):
        problem = f"not the URL of a database; {known}"
    except ImportError as error:
        problem = (
            f"{parsed.drivername} needs a driver that is not installed ({error}); "
            "install it, or choose another one as in postgresql+psycopg://"
        )
    else:
        file = parsed.database or ""
        folder = Path(file).absolute().parent
        is_file = parsed.get_backend_name() == "sqlite" and not file.startswith((":", "file:"))
        if not is_file or folder.is_dir():
            return
        problem = f"{folder}: no such folder; make it, or give another one"
    raise RunError(f"run.registry: {problem}") from None


class RunIndex:
    """Reads and writes the table; makes it when it is not there. Errors are SQLAlchemy's."""

    def __init__(self, url: str) -> None:
        parsed = sa.make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        arguments: dict[str, Any] = {}
        if is_sqlite:
            arguments["timeout"] = _BUSY_SECONDS
        elif parsed.get_backend_name() == "postgresql":
            arguments["connect_timeout"] = 5
        # No pool: a status is written every few minutes, and files or servers must not be held.
        self._engine = sa.create_engine(parsed, connect_args=arguments, poolclass=sa.NullPool)
        if is_sqlite:
            sa.event.listen(self._engine, "connect", _use_write_ahead_log)
        with self._engine.begin() as connection:
            connection.execute(CreateTable(runs_table, if_not_exists=True))
            _add_columns(connection)

    def put(self, record: RunRecord) -> None:
        """Insert or update the row of `record.folder`."""
        self.update([record])

    def update(self, records: Iterable[RunRecord], gone: Iterable[str] = ()) -> None:
        """Insert or update the rows of `records`, and delete those of the folders `gone`."""
        folder = runs_table.c.folder
        with self._engine.begin() as connection:
            for name in gone:
                connection.execute(sa.delete(runs_table).where(folder == name))
            for record in records:
                row = msgspec.structs.asdict(record)
                change = sa.update(runs_table).where(folder == record.folder).values(row)
                if connection.execute(change).rowcount == 0:
                    connection.execute(sa.insert(runs_table).values(row))

    def all(self) -> list[RunRecord]:
        """Every row, oldest run first."""
        query = sa.select(runs_table).order_by(runs_table.c.created, runs_table.c.folder)
        with self._engine.connect() as connection:
            return [RunRecord(**row) for row in connection.execute(query).mappings()]

    def replace_all(self, records: Iterable[RunRecord]) -> None:
        """Make the table hold exactly `records`, in one transaction."""
        rows = [msgspec.structs.asdict(record) for record in records]
        with self._engine.begin() as connection:
            connection.execute(sa.delete(runs_table))
            if rows:
                connection.execute(sa.insert(runs_table), rows)


def _add_columns(connection: sa.Connection) -> None:
    """Give a table that an earlier release made the columns that it lacks."""
    name = runs_table.name
    known = {column["name"] for column in sa.inspect(connection).get_columns(name)}
    for column in runs_table.columns:
        if column.name not in known:
            kind = column.type.compile(connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {name} ADD COLUMN {column.name} {kind}"))


def _use_write_ahead_log(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
