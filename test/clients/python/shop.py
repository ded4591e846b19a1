"""What the programs of this example share: connecting, waiting without polling, stopping, and which errors pass.

They need psycopg 3 (Debian: python3-psycopg) and nothing of Millrace but its SQL functions.
"""

import os
import select
import signal
import socket
import sys
import time

import psycopg
from psycopg.rows import namedtuple_row


def connect(name, url=None):
    """Opens a connection.

    In autocommit: a driver that begins transactions by itself would leave the one of receive open, and nobody else of the group could receive.
    Without prepared statements, which psycopg makes of what it has sent five times: behind PgBouncer the next transaction may be in another session.
    """
    return psycopg.connect(
        url or os.environ["DATABASE_URL"], application_name=name, autocommit=True, prepare_threshold=None, row_factory=namedtuple_row
    )


def passes(error):
    """Whether the same call can succeed a little later."""
    state = error.sqlstate
    if state is None:  # no answer from the server: the connection was refused or lost
        return isinstance(error, psycopg.OperationalError)
    return state in ("25P03", "40001", "40P01", "55P03", "57014") or state.startswith(("08", "53", "57P"))


def claim_ended(error):
    """Whether the messages belong to somebody else now. The transaction has rolled back, so nothing is to be undone."""
    return getattr(error, "sqlstate", None) == "MR001"


def log(*words):
    print(*words, file=sys.stderr, flush=True)


class Stop:
    """Becomes asked with SIGTERM, and ends whatever select waits for it."""

    def __init__(self):
        self.asked = False
        self.socket, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        self._wake = wake
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked = True

    def fileno(self):
        return self.socket.fileno()


class Waiter:
    """Waits until there may be something to receive from a stream."""

    def __init__(self, stream, listener, stop):
        self.stream, self.listener, self.stop = stream, listener, stop
        self.registered, self.pause = None, 1
        listener.execute("listen millrace")

    def wait(self):
        """Call it when receive has returned nothing, and receive again when it returns."""
        now = time.monotonic()
        if self.registered is None or now > self.registered + 4:
            # Publishers announce nothing while nobody is registered, so look once more before waiting.
            self.listener.execute("select millrace_engine.wait_for(array[millrace_engine.stream_id(%s)])", [self.stream])
            self.registered = now
            return
        select.select([self.listener, self.stop], [], [], self.pause)
        self.listener.pgconn.consume_input()
        # Of publishers that commit at about the same time one announces for all: look again after a millisecond, two, four. And each second in any case,
        # because not everything that becomes due is announced.
        self.pause = min(2 * self.pause, 1)
        while self.listener.pgconn.notifies():  # whatever it was, look
            self.pause = 0.001
        # Only where neither a processor nor the manager runs: somebody has to publish what was delayed.
        self.listener.execute("select millrace_engine.move_due(1000)")


def serve(name, stream, consume):
    """Calls consume(connection, waiter, stop) until SIGTERM, and again with new connections when the trouble passes."""
    stop = Stop()
    while not stop.asked:
        try:
            # LISTEN has a connection of its own, which must reach PostgreSQL directly; the other may go through a pooler: then LISTEN_URL is set, too.
            with connect(name) as conn, connect(name + " listener", os.environ.get("LISTEN_URL")) as listener:
                consume(conn, Waiter(stream, listener, stop), stop)
        except psycopg.Error as error:
            if not passes(error):
                raise
            log("connecting again:", error.sqlstate or "no answer")
            select.select([stop], [], [], 0.2)
