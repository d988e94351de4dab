// The file reader: right bytes in the right places, every request reported once, nothing left behind.
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <atomic>
#include <random>
#include <set>

#include "crc32c.h"
#include "reading.h"

using namespace specgate;
using namespace specgate::test;

namespace {

/// Segments of several files at any offset and remainder arrive, and no byte beside them changes.
void reads_what_is_there(Options options, const std::filesystem::path& parent) {
  const Folder folder(parent);
  const uint64_t sizes[] = {700 << 10, (400 << 10) + 1234, 4096, 17};
  std::vector<std::string> paths;
  for (int f = 0; f < 4; ++f) paths.push_back(folder.file(std::to_string(f), f + 1, sizes[f]));
  options.chunk = 64 << 10;
  Collector collector(paths, options);
  std::mt19937_64 random(11);
  Memory memory(700 << 10);
  for (uint64_t id = 0; id < 100; ++id) {
    ReadRequest request;
    request.id = id;
    memory.clear(random() % 3 == 0 ? random() % 8 * 512 : random() % 4096);
    Bytes expected(memory.size(), 0x5C);
    uint64_t at = 0;
    const int segments = 1 + static_cast<int>(random() % 4);
    Bytes joined;
    for (int s = 0; s < segments; ++s) {
      Segment segment;
      segment.file = static_cast<int>(random() % 4);
      const uint64_t size = sizes[segment.file];
      segment.offset = random() % (size + 1);
      segment.length = random() % 8 == 0 ? 0 : random() % (size - segment.offset + 1);
      if (random() % 2) {
        segment.offset = segment.offset / 4096 * 4096;
        segment.length = size - segment.offset;  // to the end of the file
      }
      if (random() % 2) at = (at + 4095) / 4096 * 4096;
      if (at + segment.length > memory.size()) continue;
      segment.at = at;
      at += segment.length + random() % 100;
      const Bytes bytes = bytes_of(segment.file + 1, segment.offset, segment.length);
      std::copy(bytes.begin(), bytes.end(), expected.begin() + segment.at);
      joined.insert(joined.end(), bytes.begin(), bytes.end());
      request.segments.push_back(segment);
      if (at > memory.size()) at = memory.size();
    }
    request.destination = memory.data();
    request.capacity = memory.size();
    if (random() % 2) request.crc = crc32c(joined.data(), joined.size());
    collector.reader->submit(request);
    const ReadResult result = collector.wait(id);
    CHECK(result.status == ReadResult::Ok && result.error.empty());
    if (memory.copy() != expected) {
      CHECK(!"the bytes of the files");
      std::fprintf(stderr, "request %d, %s\n", static_cast<int>(id), collector.reader->backend());
    }
  }
  const ReadStats stats = collector.reader->stats();
  CHECK(stats.submitted == 100 && stats.ok == 100 && stats.in_flight == 0 && stats.running == 0);
  CHECK(options.direct || stats.direct_reads == 0);
  if (collector.reader->direct(0)) CHECK(stats.direct_reads == stats.reads && stats.bytes_bounced > 0);
}

/// One large read is cut, and its parts run side by side, directly and in place.
void uses_the_depth(Options options) {
  const Folder folder;
  const uint64_t size = 8 << 20;
  options.chunk = 256 << 10;
  Collector collector({folder.file("big", 5, size)}, options);
  Memory memory(size);
  const Bytes expected = bytes_of(5, 0, size);
  const uint32_t crc = crc32c(expected.data(), size);
  CHECK(collector.read(1, {{0, 0, size, 0}}, memory, crc).status == ReadResult::Ok);
  CHECK(memory.copy() == expected);
  const ReadStats stats = collector.reader->stats();
  const uint64_t most = options.backend == Options::Uring ? options.depth : options.threads;
  CHECK(stats.reads == 32 && stats.peak_in_flight > 1 && stats.peak_in_flight <= most);
  CHECK(stats.bytes_wanted == size);
  if (collector.reader->direct(0)) CHECK(stats.bytes == size && stats.bytes_bounced == 0);
}

/// What has not begun never does; the report comes once; memory is left alone after it.
void cancels(Options options) {
  const Folder folder;
  const uint64_t size = 8 << 20;
  const std::string path = folder.file("a", 2, size);
  Gate gate;
  std::atomic<int> reads{0};
  options.threads = 1;
  options.depth = 1;
  options.chunk = 1 << 20;
  options.fault = [&](int, uint64_t, uint64_t) {
    if (++reads == 3) gate.pass();
    return ReadFault{};
  };
  Memory first(size), second(size), third(size);
  Collector collector({path}, options);
  FileReader& reader = *collector.reader;
  reader.submit({1, {{0, 0, size, 0}}, first.data(), size, {}});
  reader.submit({2, {{0, 0, size, 0}}, second.data(), size, {}});
  reader.submit({3, {{0, 0, 4096, 0}}, third.data(), size, {}});
  gate.await(1);  // two parts of the first have been read, the third stands at the gate
  CHECK(!reader.cancel(99));
  CHECK(reader.cancel(2) && reader.cancel(2));
  CHECK(reader.cancel(1));
  CHECK(collector.times().count(1) == 0);  // a part is still with the reader
  gate.open();
  CHECK(collector.wait(1).status == ReadResult::Cancelled);
  const Bytes at_report = first.copy();
  CHECK(collector.wait(2).status == ReadResult::Cancelled && collector.wait(3).status == ReadResult::Ok);
  CHECK(!reader.cancel(1) && !reader.cancel(3));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(first.copy() == at_report && second.copy() == Bytes(size, 0x5C));
  CHECK(reads <= 4);  // three parts of the first, and the third request
  for (const auto& [id, times] : collector.times()) CHECK(times == 1);
  reader.submit({1, {{0, 5, 100, 0}}, first.data(), size, {}});  // a reported id is free again
}

/// Destruction in the middle of it: all are reported, once each, and nothing stays.
void leaves_nothing_behind(Options options) {
  const std::size_t threads = entries_of("/proc/self/task"), descriptors = entries_of("/proc/self/fd");
  const Folder folder;
  const uint64_t size = 1 << 20, part = 200 << 10;
  const std::string path = folder.file("a", 2, size);
  options.chunk = 16 << 10;
  for (int round = 0; round < 12; ++round) {
    Memory memory(50 * part);
    std::map<uint64_t, int> times;
    Bytes after;
    {
      Collector collector({path, path}, options);
      for (uint64_t id = 0; id < 50; ++id) {
        const Segment segment{static_cast<int>(id % 2), id * 100, part, id * part};
        collector.reader->submit({id, {segment}, memory.data(), memory.size(), {}});
      }
      if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      collector.reader->close();
      after = memory.copy();
      CHECK_THROWS(collector.reader->submit({77, {}, nullptr, 0, {}}));
      times = collector.times();
      const ReadStats stats = collector.reader->stats();
      CHECK(stats.submitted == 50 && stats.ok + stats.cancelled == 50 && stats.in_flight == 0);
      collector.reader->close();
    }
    CHECK(times.size() == 50);
    for (const auto& [id, n] : times) CHECK(n == 1);
    CHECK(memory.copy() == after);
  }
  CHECK(returns_to(threads, descriptors));
}

/// Threads that submit and cancel at random: Cancelled if and only if cancel() said so, the right bytes
/// otherwise.
void many_threads(Options options) {
  const Folder folder;
  const uint64_t size = 512 << 10;
  const std::vector<std::string> paths = {folder.file("a", 1, size), folder.file("b", 2, size)};
  options.chunk = 16 << 10;
  constexpr int kThreads = 4, kRequests = 60;
  std::mutex mutex;
  std::set<uint64_t> cancelled;
  std::vector<std::unique_ptr<Memory>> memories(kThreads * kRequests);
  std::vector<Segment> segments(kThreads * kRequests);
  Collector collector(paths, options);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int i = 0; i < kRequests; ++i) {
        const uint64_t id = t * kRequests + i, offset = random() % (size / 2), length = random() % (size / 2);
        segments[id] = {static_cast<int>(random() % 2), offset, length, 0};
        memories[id] = std::make_unique<Memory>(length, random() % 4096);
        collector.reader->submit({id, {segments[id]}, memories[id]->data(), length, {}});
        const uint64_t victim = t * kRequests + random() % (i + 1);
        if (random() % 3 == 0 && collector.reader->cancel(victim)) {
          const std::lock_guard lock(mutex);
          cancelled.insert(victim);
        }
        if (random() % 50 == 0) collector.reader->stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (uint64_t id = 0; id < memories.size(); ++id) {
    const ReadResult result = collector.wait(id);
    CHECK(result.status == (cancelled.count(id) != 0 ? ReadResult::Cancelled : ReadResult::Ok));
    if (result.status != ReadResult::Ok) continue;
    const Segment& s = segments[id];
    CHECK(memories[id]->copy() == bytes_of(s.file + 1, s.offset, s.length));
  }
  for (const auto& [id, times] : collector.times()) CHECK(times == 1);
  std::printf("%s: %zu of %zu cancelled\n", collector.reader->backend(), cancelled.size(), memories.size());
}

/// A report may lead to the next request.
void chains(Options options) {
  const Folder folder;
  const std::string path = folder.file("a", 4, 1 << 20);
  Memory memory(1 << 20);
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t last = 0;
  FileReader* self = nullptr;
  FileReader reader({path}, options, [&](ReadResult&& result) {
    CHECK(result.status == ReadResult::Ok && result.finished_ns >= result.started_ns);
    if (result.id < 100) self->submit({result.id + 1, {{0, 0, 4096, 0}}, memory.data(), memory.size(), {}});
    const std::lock_guard lock(mutex);
    last = result.id;
    changed.notify_all();
  });
  self = &reader;
  reader.submit({1, {}, nullptr, 0, {}});  // nothing to read is a result too
  std::unique_lock lock(mutex);
  CHECK(changed.wait_for(lock, std::chrono::seconds(60), [&] { return last == 100; }));
}

/// A child made by fork has none of the reader's threads, and does not wait for them.
void forks(Options options) {
  const Folder folder;
  Memory memory(1 << 20);
  Collector collector({folder.file("a", 4, 1 << 20)}, options);
  CHECK(collector.read(1, {{0, 0, 1 << 20, 0}}, memory).status == ReadResult::Ok);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    collector.reader.reset();
    ::_exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(collector.read(2, {{0, 5, 1 << 19, 0}}, memory).status == ReadResult::Ok);
}

/// Where the kernel refuses io_uring, as container engines make it do, Auto reads with pread.
void falls_back_without_io_uring() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog program{4, filter};
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_SECCOMP, 2, &program) != 0)
      ::_exit(77);
    const Folder folder;
    Options options;
    {
      Collector collector({folder.file("a", 3, 100000)}, options);
      CHECK(std::string(collector.reader->backend()) == "pread");
      CHECK(collector.reader->fallback().find("io_uring_setup") != std::string::npos);
      Memory memory(100000);
      CHECK(collector.read(1, {{0, 0, 100000, 0}}, memory).status == ReadResult::Ok);
      CHECK(memory.copy() == bytes_of(3, 0, 100000));
    }
    options.backend = Options::Uring;
    CHECK_THROWS(FileReader({folder.path("a")}, options, [](ReadResult&&) {}));
    ::_exit(failures == 0 ? 0 : 1);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77));
}

}  // namespace

int main() {
  ::alarm(220);  // a hang ends here
  falls_back_without_io_uring();
  for (const Options::Backend backend : backends()) {
    Options options;
    options.backend = backend;
    reads_what_is_there(options, std::filesystem::temp_directory_path());
    if (std::filesystem::is_directory("/dev/shm")) reads_what_is_there(options, "/dev/shm");
    uses_the_depth(options);
    cancels(options);
    leaves_nothing_behind(options);
    many_threads(options);
    chains(options);
    forks(options);
    options.direct = false;
    reads_what_is_there(options, std::filesystem::temp_directory_path());
    many_threads(options);
    leaves_nothing_behind(options);
  }
  return report("file_reader");
}
