// Emmett's event store doing the tasks of package eventstore: each line of standard input is a task as JSON, each line of standard output its outcome.
//
// It is tuned as its documentation and its own benchmarks have it: one pool of connections, of which there are as many as other systems have, migrations before the work, inline
// projections off. PEER is the directory of its node_modules, DSN the database, CONNECTIONS the size of the pool, BODIES a file with the events' bodies.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const require = createRequire(`${process.env.PEER}/package.json`);
const { getPostgreSQLEventStore } = require('@event-driven-io/emmett-postgresql');
const { isExpectedVersionConflictError } = require('@event-driven-io/emmett');
const pg = require('pg');

const pool = new pg.Pool({ connectionString: process.env.DSN, max: Number(process.env.CONNECTIONS) });
const store = getPostgreSQLEventStore(process.env.DSN, { schema: { autoMigration: 'None' }, connectionOptions: { pool } });
const bodies = JSON.parse(readFileSync(process.env.BODIES, 'utf8'));

const event = (n) => ({ type: 'Booked', data: { n, ...bodies[n % bodies.length] } });
const entity = (task, i) => `${task.prefix}-${i}`;
const evolve = (state, { data }) => ({ sum: state.sum + data.amount });

async function rounds(task, client, o) {
  const per = task.rounds * task.events;
  for (let round = 0; round < task.rounds; round++) {
    for (let i = client; i < task.entities; i += task.clients) {
      o.calls++;
      if (task.verb === 'append') {
        const events = Array.from({ length: task.events }, (_, k) => event(task.first + i * per + round * task.events + k));
        await store.appendToStream(entity(task, i), events, { expectedStreamVersion: BigInt(round * task.events) });
      } else if (task.verb === 'read') {
        const { events } = await store.readStream(entity(task, i));
        o.events += events.length;
      } else {
        const { state } = await store.aggregateStream(entity(task, i), { evolve, initialState: () => ({ sum: 0 }) });
        o.sum += state.sum;
      }
    }
  }
}

async function contend(task, client, o) {
  const known = new Array(task.entities).fill(0n);
  for (let round = 0; round < task.rounds; round++) {
    const i = (client + round) % task.entities;
    const n = task.first + client * task.rounds + round;
    for (;;) {
      o.calls++;
      try {
        const { nextExpectedStreamVersion } = await store.appendToStream(entity(task, i), [event(n)], { expectedStreamVersion: known[i] });
        known[i] = nextExpectedStreamVersion;
        o.accepted.push([i, Number(known[i]), n]);
        break;
      } catch (error) {
        if (!isExpectedVersionConflictError(error)) throw error;
      }
      o.refused++;
      const { events } = await store.readStream(entity(task, i), { from: known[i] + 1n });
      if (events.length === 0) o.unfounded++;
      known[i] += BigInt(events.length);
    }
  }
}

async function perform(task) {
  const o = { calls: 0, events: 0, sum: 0, refused: 0, unfounded: 0, accepted: [] };
  const start = performance.now();
  await Promise.all(Array.from({ length: task.clients }, (_, client) => (task.verb === 'contend' ? contend : rounds)(task, client, o)));
  return { seconds: (performance.now() - start) / 1000, ...o };
}

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n');

try {
  await store.schema.migrate();
  say({ node: process.versions.node });
  for await (const line of createInterface({ input: process.stdin })) say(await perform(JSON.parse(line)));
  await pool.end();
} catch (error) {
  say({ error: String(error.stack ?? error).replaceAll(process.env.DSN, '<dsn>') });
  process.exit(1);
}
