"""Shows dead letters of billing and gives those back whose cause is gone.

usage: redrive.py <text of the reason>
"""

import sys

from psycopg.types.json import Jsonb

import shop


def main():
    with shop.connect("redrive") as conn:
        for dead in conn.execute("select position, attempts, reason from millrace.dead_letters('orders', 'billing')"):
            print(dead.position, dead.attempts, dead.reason)
        moved, call = 0, None
        while call != 0:
            call = conn.execute(
                "select millrace.redrive('orders', 'billing', %s, p_max => 1000) as moved", [Jsonb({"reason": sys.argv[1]})]
            ).fetchone().moved
            moved += call
        print("redriven:", moved)


if __name__ == "__main__":
    main()
