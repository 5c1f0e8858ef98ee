-- One line that harness::client::load reads: requests, microseconds, errors, latencies in microseconds.
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("failed: %d connects, %d reads, %d writes, %d statuses, %d timeouts\n", e.connect, e.read,
    e.write, e.status, e.timeout))
  io.write(string.format("REPORT %d %d %d %.1f %.1f %.1f %.1f\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
