"""Publishes orders with the rows they belong to.

usage: producer.py <number of orders>
"""

import sys

import psycopg
from psycopg.types.json import Jsonb

import shop


class Cancelled(Exception):
    pass


def place(conn, order, cancel=False):
    """The order's row and its message are committed together, or neither is."""
    with conn.transaction():
        conn.execute("insert into shop_order (id, customer, amount) values (%(id)s, %(customer)s, %(amount)s)", order)
        conn.execute("select millrace.publish('orders', %s, %s)", [Jsonb(order), order["customer"]])
        if cancel:
            raise Cancelled


def place_all(conn, orders):
    """Many messages in one call. Their positions come back in the order of the array."""
    with conn.transaction():
        for order in orders:
            conn.execute("insert into shop_order (id, customer, amount) values (%(id)s, %(customer)s, %(amount)s)", order)
        rows = conn.execute(
            "select * from millrace.publish_batch('orders', %s, %s)",
            [[Jsonb(order) for order in orders], [order["customer"] for order in orders]],
        ).fetchall()
    return [row[0] for row in rows]


def place_later(conn, order, seconds):
    """The message comes after the delay, so there is no position yet."""
    with conn.transaction():
        conn.execute("insert into shop_order (id, customer, amount) values (%(id)s, %(customer)s, %(amount)s)", order)
        conn.execute(
            "select millrace.publish('orders', %s, %s, p_delay_seconds => %s)", [Jsonb(order), order["customer"], seconds]
        )


def place_once(conn, order):
    """May be repeated when its answer was lost: the second message is not appended, and the position is the first one's."""
    for attempt in range(5):
        try:
            with conn.transaction():
                conn.execute(
                    "insert into shop_order (id, customer, amount) values (%(id)s, %(customer)s, %(amount)s) on conflict do nothing", order
                )
                return conn.execute(
                    "select millrace.publish('orders', %s, %s, p_dedupe_key => %s) as position",
                    [Jsonb(order), order["customer"], order["id"]],
                ).fetchone().position
        except psycopg.Error as error:
            if attempt == 4 or not shop.passes(error):
                raise


def order(name, number, amount=10, **more):
    return {"id": name, "customer": f"customer-{number % 7}", "amount": amount, **more}


def main():
    with shop.connect("producer") as conn:
        place(conn, order("large", 3, amount=5000))
        place(conn, order("wrong", 4, amount=-1))
        for n, name in enumerate(("flaky", "stuck", "lost", "refused")):
            place(conn, order(name, n))
        for n in range(int(sys.argv[1])):
            try:
                place(conn, order(f"o-{n}", n), cancel=n % 10 == 9)
            except Cancelled:
                pass
        positions = place_all(conn, [order(f"batch-{n}", n) for n in range(40)])
        assert positions == sorted(positions), positions
        place_later(conn, order("later", 1), 0.5)
        first = place_once(conn, order("once", 2))
        assert place_once(conn, order("once", 2)) == first


if __name__ == "__main__":
    main()
