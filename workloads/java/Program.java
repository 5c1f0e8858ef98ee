import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** Threads, sockets, timers and rubbish; whatever is not as it must be ends the program. */
public final class Program {
    interface Work {
        void run() throws Exception;
    }

    static void thread(String name, Work work) {
        new Thread(() -> {
            try {
                work.run();
            } catch (Throwable error) {
                error.printStackTrace();
                System.err.flush();
                Runtime.getRuntime().halt(1);
            }
        }, name).start();
    }

    static void say(String name, long what) throws Exception {
        Path fresh = Path.of("/tmp/." + name);
        Files.writeString(fresh, Long.toString(what));
        Files.move(fresh, Path.of("/tmp/" + name), StandardCopyOption.ATOMIC_MOVE);
    }

    static void require(boolean condition, String what) {
        if (!condition) throw new AssertionError(what);
    }

    /** Objects that live for a while, some for long: the collector has to move them. */
    static void rubbish(int number) throws Exception {
        Random random = new Random(number);
        List<long[]> live = new ArrayList<>();
        for (long round = 0; ; round++) {
            long[] fresh = new long[1 + random.nextInt(5000)];
            Arrays.fill(fresh, fresh.length * 31L);
            if (live.size() < 500) live.add(fresh);
            else live.set(random.nextInt(500), fresh);
            long[] any = live.get(random.nextInt(live.size()));
            require(any[0] == any.length * 31L && any[any.length - 1] == any[0], "an object has changed");
            if (round % 10000 == 0) say("rubbish" + number, round);
        }
    }

    static void echo(ServerSocketChannel server) throws Exception {
        Selector selector = Selector.open();
        server.configureBlocking(false).register(selector, SelectionKey.OP_ACCEPT);
        ByteBuffer buffer = ByteBuffer.allocateDirect(65536);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel client = server.accept();
                    client.configureBlocking(false).register(selector, SelectionKey.OP_READ);
                } else {
                    SocketChannel client = (SocketChannel) key.channel();
                    buffer.clear();
                    if (client.read(buffer) < 0) {
                        client.close();
                        continue;
                    }
                    buffer.flip();
                    while (buffer.hasRemaining()) client.write(buffer);
                }
            }
            selector.selectedKeys().clear();
        }
    }

    static void client(int number) throws Exception {
        SocketChannel channel = SocketChannel.open(new InetSocketAddress("127.0.0.1", 9000));
        Random random = new Random(number);
        for (long round = 0; ; round++) {
            byte[] sent = new byte[1 + random.nextInt(60000)];
            random.nextBytes(sent);
            ByteBuffer out = ByteBuffer.wrap(sent);
            while (out.hasRemaining()) channel.write(out);
            ByteBuffer in = ByteBuffer.allocate(sent.length);
            while (in.hasRemaining()) require(channel.read(in) > 0, "the connection was closed");
            require(Arrays.equals(sent, in.array()), "other bytes came back");
            if (round % 20 == 0) say("client" + number, round);
            Thread.sleep(1);
        }
    }

    /** One thread hands numbers to another: none is lost. */
    static void handing() {
        SynchronousQueue<Long> queue = new SynchronousQueue<>();
        thread("giver", () -> {
            for (long number = 0; ; number++) queue.put(number);
        });
        thread("taker", () -> {
            for (long number = 0; ; number++) {
                require(queue.take() == number, "a number is missing");
                if (number % 5000 == 0) say("handed", number);
            }
        });
    }

    static void hashing() throws Exception {
        var pool = Executors.newFixedThreadPool(8);
        String first = null;
        for (long round = 0; ; round++) {
            List<Future<String>> results = new ArrayList<>();
            for (int number = 0; number < 16; number++) {
                results.add(pool.submit(() -> {
                    MessageDigest digest = MessageDigest.getInstance("SHA-256");
                    for (int n = 0; n < 200; n++) digest.update(("round " + n).getBytes());
                    return Arrays.toString(digest.digest());
                }));
            }
            for (Future<String> result : results) {
                if (first == null) first = result.get();
                require(result.get().equals(first), "another hash");
            }
            say("hashed", round);
            Thread.sleep(5);
        }
    }

    static void timers() throws Exception {
        AtomicLong ticks = new AtomicLong();
        ConcurrentHashMap<Long, Long> seen = new ConcurrentHashMap<>();
        Executors.newScheduledThreadPool(2).scheduleWithFixedDelay(() -> {
            try {
                long tick = ticks.incrementAndGet();
                require(seen.put(tick, System.nanoTime()) == null, "a tick came twice");
                Long before = seen.remove(tick - 1);
                require(before == null || System.nanoTime() - before >= 19_900_000, "a tick came early");
                say("ticks", tick);
            } catch (Throwable error) {
                error.printStackTrace();
                Runtime.getRuntime().halt(1);
            }
        }, 20, 20, TimeUnit.MILLISECONDS);
    }

    public static void main(String[] arguments) throws Exception {
        for (int number = 0; number < 2; number++) {
            int own = number;
            thread("rubbish" + number, () -> rubbish(own));
        }
        // It listens before anybody connects.
        ServerSocketChannel server = ServerSocketChannel.open().bind(new InetSocketAddress("127.0.0.1", 9000));
        thread("server", () -> echo(server));
        for (int number = 0; number < 4; number++) {
            int own = number;
            thread("client" + number, () -> client(own));
        }
        handing();
        thread("hashing", Program::hashing);
        timers();
    }
}
