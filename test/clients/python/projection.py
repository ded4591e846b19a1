"""Keeps what each customer has ordered, in order. A member of the Ordered group projection.

It acks a claim in the same round trip that receives the next one, so after a crash messages come twice; the row knows how far it is.

usage: projection.py <member>
"""

import sys

import psycopg

import shop

MEMBER = sys.argv[1]
LEASE_SECONDS = 2


def consume(conn, waiter, stop):
    done = None  # the claim whose messages are done, but not yet acked
    while not stop.asked:
        try:
            batch = conn.execute(
                "select claim, position, key, payload from millrace.receive('orders', 'projection', %s, 20, %s, p_ack => %s)",
                [MEMBER, LEASE_SECONDS, done],
            ).fetchall()
        except psycopg.Error as error:
            if not shop.claim_ended(error):
                raise
            batch = []
        done = None
        for message in batch:
            project(conn, message)
            done = message.claim
        if not batch:
            waiter.wait()
    if done:
        try:
            conn.execute("select millrace.ack(%s)", [done])
        except psycopg.Error as error:
            if not shop.claim_ended(error):
                raise
    conn.execute("select millrace.leave('orders', 'projection', %s)", [MEMBER])


def project(conn, message):
    """Positions of a key only go up in an Ordered group, so a message that was seen before changes nothing."""
    conn.execute(
        """insert into account as a (customer, position, orders, total) values (%s, %s, 1, %s)
           on conflict (customer) do update
           set position = excluded.position, orders = a.orders + 1, total = a.total + excluded.total
           where a.position < excluded.position""",
        [message.key, message.position, message.payload["amount"]],
    )


if __name__ == "__main__":
    shop.serve(MEMBER, "orders", consume)
