// An http server and clients that keep their connections, timers, worker threads, a watched file, a child process.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const assert = require('assert');
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const { spawn } = require('child_process');

function say(name, what) {
  fs.writeFileSync(`/tmp/.${name}`, String(what));
  fs.renameSync(`/tmp/.${name}`, `/tmp/${name}`);
}

// Workers count together in shared memory, and hash what they are sent.
if (!isMainThread) {
  const shared = new Int32Array(workerData);
  parentPort.on('message', (text) => {
    Atomics.add(shared, 0, 1);
    parentPort.postMessage({ text, hash: crypto.createHash('sha256').update(text).digest('hex') });
  });
  return;
}

const shared = new SharedArrayBuffer(4);
for (let number = 0; number < 3; number++) {
  const worker = new Worker(__filename, { workerData: shared });
  let count = 0;
  const send = () => worker.postMessage(`${number}-${count}`);
  worker.on('message', ({ text, hash }) => {
    assert.strictEqual(text, `${number}-${count}`);
    assert.strictEqual(hash, crypto.createHash('sha256').update(text).digest('hex'));
    say(`worker${number}`, ++count);
    setTimeout(send, 2);
  });
  send();
}
setInterval(() => say('shared', Atomics.load(new Int32Array(shared), 0)), 50);

let server_count = 0;
http.createServer({ keepAliveTimeout: 600_000 }, (request, response) => {
  const chunks = [];
  request.on('data', (chunk) => chunks.push(chunk));
  request.on('end', () => setTimeout(() => {
    response.setHeader('x-count', ++server_count);
    response.end(Buffer.concat(chunks).reverse());
  }, 3));
}).listen(8080, '127.0.0.1', () => { for (let number = 0; number < 6; number++) ask(number, 0, null); });

const agent = new http.Agent({ keepAlive: true, maxSockets: 6 });
function ask(number, count, socket) {
  const body = crypto.randomBytes(1 + Math.floor(Math.random() * 50000));
  const request = http.request({ port: 8080, host: '127.0.0.1', method: 'POST', agent }, (response) => {
    const chunks = [];
    response.on('data', (chunk) => chunks.push(chunk));
    response.on('end', () => {
      assert(Buffer.concat(chunks).equals(Buffer.from(body).reverse()), `client ${number}: another answer`);
      say(`client${number}`, count);
      setTimeout(() => ask(number, count + 1), 1);
    });
  });
  request.end(body);
}

// The clock never steps back.
let before = process.hrtime.bigint(), ticks = 0;
const tick = () => {
  const now = process.hrtime.bigint();
  assert(now > before, `a tick after ${now - before} ns`);
  before = now;
  say('ticks', ++ticks);
  setTimeout(tick, 50);
};
setTimeout(tick, 50);

// A file that is watched is changed by another program.
fs.writeFileSync('/tmp/watched', '');
let seen = 0;
fs.watch('/tmp/watched', () => say('seen', ++seen));

const child = spawn('cat');
let line = 0;
child.stdout.on('data', (data) => {
  assert.strictEqual(String(data), `line ${line}\n`);
  say('lines', ++line);
  setTimeout(() => child.stdin.write(`line ${line}\n`), 5);
});
child.stdin.write('line 0\n');

// Rubbish for the collector.
let heap = [];
setInterval(() => {
  heap = heap.slice(-200);
  for (let n = 0; n < 100; n++) heap.push({ n, text: 'x'.repeat(1000 + n) });
  assert(heap.every((entry) => entry.text.length === 1000 + entry.n));
}, 5);
process.on('uncaughtException', (error) => { console.error(error); process.exit(1); });
