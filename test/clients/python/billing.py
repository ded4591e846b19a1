"""Writes one invoice for each order, exactly once. A member of the Shared group billing.

usage: billing.py <member>
"""

import json
import os
import sys
import urllib.request

import psycopg

import shop

MEMBER = sys.argv[1]
LEASE_SECONDS = 2


class Unbillable(Exception):
    pass


def consume(conn, waiter, stop):
    while not stop.asked:
        batch = conn.execute(
            "select claim, position, payload, attempt from millrace.receive('orders', 'billing', %s, p_max => 10, p_lease_seconds => %s)",
            [MEMBER, LEASE_SECONDS],
        ).fetchall()
        if not batch:
            waiter.wait()
        try:
            for message in batch:
                if not stop.asked:
                    bill(conn, message)
        except psycopg.Error as error:
            if not shop.claim_ended(error):
                raise
            shop.log("the claim has ended; its messages are delivered again")
    # What is left of a claim goes to the others at once. A member that dies does not come here: its claim ends with the lease.
    conn.execute("select millrace.leave('orders', 'billing', %s)", [MEMBER])


def bill(conn, message):
    try:
        tax = tax_of(conn, message)
        with conn.transaction():
            # First the ack: it raises MR001 if somebody else has the message by now, and if not, nobody gets it before this transaction ends.
            conn.execute("select millrace.ack_messages(%s, %s)", [message.claim, [message.position]])
            conn.execute(
                "insert into invoice (order_id, tax, member, attempt) values (%s, %s, %s, %s)",
                [message.payload["id"], tax, MEMBER, message.attempt],
            )
    except Unbillable as error:  # never again
        conn.execute("select millrace.dead_letter(%s, %s, %s)", [message.claim, [message.position], str(error)])
    except Exception as error:
        if conn.closed or shop.claim_ended(error):
            raise
        # The service is down, or something is wrong with the order or with this program. Nothing was committed, and the message is still held: again in a
        # moment, and a dead letter after the group's max_attempts.
        reason = f"{type(error).__name__}: {error}"
        conn.execute("select millrace.nack(%s, %s, 0.2, %s)", [message.claim, [message.position], reason])


def tax_of(conn, message):
    """Asks a service that may be slow or down. It changes nothing there, so it does no harm to ask twice."""
    order = message.payload
    if order["amount"] <= 0:
        raise Unbillable("the amount is not positive")
    if order["amount"] > 1000:  # takes longer
        conn.execute("select millrace.extend(%s, 60)", [message.claim])
    request = urllib.request.Request(f"{os.environ['TAX_URL']}/{order['id']}", headers={"User-Agent": MEMBER})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    shop.serve(MEMBER, "orders", consume)
