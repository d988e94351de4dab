// What goes wrong under a file reader ends in one sentence that names the file, or in the right bytes.
#include <sys/resource.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>

#include "crc32c.h"
#include "reading.h"

using namespace specgate;
using namespace specgate::test;

namespace {

constexpr uint64_t kSize = 3 << 20;

bool says(const ReadResult& result, const std::string& path, const std::string& text) {
  const bool good = result.status == ReadResult::Failed && result.error.find(path) != std::string::npos &&
                    result.error.find(text) != std::string::npos;
  if (!good) std::fprintf(stderr, "status %d: %s\n", result.status, result.error.c_str());
  return good;
}

/// Errors that the kernel reports once in a while, or for good.
void errors(Options options) {
  const Folder folder;
  const std::string path = folder.file("experts", 1, kSize);
  std::atomic<int> left{0}, error{0};
  std::atomic<uint64_t> limit{UINT64_MAX};
  options.chunk = 1 << 20;
  options.fault = [&](int, uint64_t offset, uint64_t) {
    if (offset / options.chunk != 1 || left.fetch_sub(1) <= 0) return ReadFault{};
    return ReadFault{error, limit};
  };
  Memory memory(kSize);
  const Bytes expected = bytes_of(1, 0, kSize);
  const uint32_t crc = crc32c(expected.data(), kSize);
  uint64_t id = 0, retries = 0;
  Collector collector({path}, options);
  const bool direct = collector.reader->direct(0);
  const auto read = [&](int times, int error_, uint64_t limit_) {
    left = times;
    error = error_;
    limit = limit_;
    std::memset(memory.data(), 0, kSize);
    retries = collector.reader->stats().retries;
    const ReadResult result = collector.read(++id, {{0, 0, kSize, 0}}, memory, crc);
    retries = collector.reader->stats().retries - retries;
    return result;
  };
  for (const int again : {EINTR, EAGAIN}) {
    CHECK(read(5, again, UINT64_MAX).status == ReadResult::Ok && retries == 5 && memory.copy() == expected);
  }
  // Short reads: what came is kept (in whole pages), the rest is asked for again.
  for (const uint64_t bytes : {4096ull, 5000ull, 100ull, 0ull, (1ull << 20) - 1}) {
    CHECK(read(2, 0, bytes).status == ReadResult::Ok && memory.copy() == expected);
    CHECK(retries == (bytes < 1 << 19 ? 2 : 1));  // the rest of the longest is less than its limit
  }
  CHECK(says(read(1, EIO, UINT64_MAX), path, "at byte 1048576 failed (Input/output error): check the disk"));
  CHECK(says(read(1 << 30, 0, 0), path, "at byte 1048576 ended early 4 times: check the file system"));
  CHECK(says(read(1 << 30, EAGAIN, UINT64_MAX), path, "Resource temporarily unavailable"));
  // Half a page at a time is no way to read directly, and a slow one otherwise.
  if (direct) CHECK(says(read(1 << 30, 0, 2000), path, "at byte 1048576 ended early 4 times"));
  if (!direct) CHECK(read(1 << 30, 0, 2000).status == ReadResult::Ok && memory.copy() == expected);
  left = 0;
  CHECK(read(0, 0, UINT64_MAX).status == ReadResult::Ok && memory.copy() == expected);
  // A file system that opens with O_DIRECT and then refuses to read so is read through the page cache.
  CHECK(collector.reader->direct(0) == direct);
  CHECK(read(1, EINVAL, UINT64_MAX).status == (direct ? ReadResult::Ok : ReadResult::Failed));
  CHECK(!collector.reader->direct(0));
  if (direct) CHECK(memory.copy() == expected);
  CHECK(read(0, 0, UINT64_MAX).status == ReadResult::Ok && memory.copy() == expected);
  CHECK(says(read(1, EINVAL, UINT64_MAX), path, "Invalid argument"));
}

/// A failed part ends its request, once, and no other.
void failure_is_one_requests_own(Options options) {
  const Folder folder;
  const std::string path = folder.file("experts", 1, kSize);
  options.chunk = 4096;
  options.fault = [](int, uint64_t offset, uint64_t) { return ReadFault{offset < 1 << 20 ? EIO : 0}; };
  Collector collector({path}, options);
  Memory bad(kSize), good(kSize);
  collector.reader->submit({1, {{0, 0, kSize, 0}}, bad.data(), kSize, {}});
  collector.reader->submit({2, {{0, 2 << 20, 1 << 20, 0}}, good.data(), kSize, {}});
  CHECK(says(collector.wait(1), path, "Input/output error"));
  CHECK(collector.wait(2).status == ReadResult::Ok);
  CHECK(!collector.reader->cancel(1));
  collector.reader->close();
  for (const auto& [id, times] : collector.times()) CHECK(times == 1);
}

void damaged_bytes(Options options) {
  const Folder folder;
  const std::string path = folder.file("experts", 1, kSize);
  Bytes expected = bytes_of(1, 5000, 2 << 20);
  const uint32_t crc = crc32c(expected.data(), expected.size());
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(1 << 20);
    file.put(static_cast<char>(byte_of(1, 1 << 20) ^ 4));
  }
  Collector collector({path}, options);
  Memory memory(2 << 20);
  const ReadResult result = collector.read(1, {{0, 5000, 2 << 20, 0}}, memory, crc);
  CHECK(says(result, path, "holds damaged bytes at byte 5000") && result.kind == StoreFailure::Kind::Corrupt);
  const Bytes tail = bytes_of(1, 2 << 20, 1 << 20);
  const std::optional<uint32_t> tail_crc = crc32c(tail.data(), tail.size());
  CHECK(collector.read(2, {{0, 2 << 20, 1 << 20, 0}}, memory, tail_crc).status == ReadResult::Ok);
}

/// The file is cut short, written to, replaced or removed while it is open.
void files_that_change(Options options) {
  const Folder folder;
  Memory memory(kSize);
  {
    const std::string path = folder.file("truncated", 1, kSize);
    Collector collector({path}, options);
    CHECK(::truncate(path.c_str(), 1 << 20) == 0);
    CHECK(says(collector.read(1, {{0, 2 << 20, 4096, 0}}, memory), path,
               "was truncated while open (from 3145728"));
    CHECK(says(collector.read(2, {{0, 0, kSize, 0}}, memory), path, "was truncated while open"));
    CHECK(says(collector.read(3, {{0, 0, 4096, 0}}, memory), path, "was truncated while open"));
  }
  {
    const std::string path = folder.file("written", 1, kSize);
    std::this_thread::sleep_for(
        std::chrono::milliseconds(50));  // the clock of files ticks every few milliseconds
    Collector collector({path}, options);
    CHECK(collector.read(1, {{0, 0, 4096, 0}}, memory).status == ReadResult::Ok);
    folder.file("written", 2, kSize);
    CHECK(says(collector.read(2, {{0, 0, 4096, 0}}, memory), path, "was changed while open"));
  }
  {
    const std::string path = folder.file("replaced", 1, kSize), other = folder.file("other", 2, kSize);
    Collector collector({other, path}, options);
    std::filesystem::rename(other, path);
    CHECK(says(collector.read(1, {{1, 0, 4096, 0}}, memory), path, "was replaced while open"));
    CHECK(collector.read(2, {{0, 0, 4096, 0}}, memory).status ==
          ReadResult::Ok);  // it is still the file it was
  }
  {
    const std::string path = folder.file("removed", 1, kSize);
    Collector collector({path}, options);
    std::filesystem::remove(path);
    CHECK(collector.read(1, {{0, 0, kSize, 0}}, memory).status == ReadResult::Ok);
    CHECK(memory.copy() == bytes_of(1, 0, kSize));
  }
  {
    const std::string path = folder.file("short", 1, 10000);
    Collector collector({path}, options);
    const char* text = "has 10000 bytes and 8192 were asked for at byte 4096";
    CHECK(says(collector.read(1, {{0, 4096, 8192, 0}}, memory), path, text));
    CHECK(says(collector.read(2, {{0, UINT64_MAX - 10, 4096, 0}}, memory), path, "has 10000 bytes"));
    CHECK(collector.read(3, {{0, 4096, 10000 - 4096, 0}}, memory).status == ReadResult::Ok);
    CHECK(collector.read(4, {{0, 10000, 0, 0}}, memory).status == ReadResult::Ok);
  }
}

std::string refusal(std::vector<std::string> paths, Options options) {
  try {
    const FileReader reader(std::move(paths), options, [](ReadResult&&) {});
  } catch (const StoreFailure& failure) {
    return failure.what();
  }
  return {};
}

void refuses_nonsense(Options options) {
  const Folder folder;
  const std::string path = folder.file("a", 1, 8192), missing = folder.path("missing");
  const std::size_t threads = entries_of("/proc/self/task"), descriptors = entries_of("/proc/self/fd");
  CHECK(refusal({path, missing}, options).find("cannot open '" + missing + "' (No such file") == 0);
  CHECK(refusal({folder.path("")}, options).find("is not a regular file") != std::string::npos);
  CHECK(::mkfifo(folder.path("fifo").c_str(), 0600) == 0);
  CHECK(refusal({folder.path("fifo")}, options).find("is not a regular file") != std::string::npos);
  for (const int bad : {0, -1, 100000}) {
    Options other = options;
    other.depth = bad;
    CHECK(refusal({path}, other).find("depth is " + std::to_string(bad)) != std::string::npos);
    other = options;
    other.threads = bad;
    CHECK(refusal({path}, other).find("threads is") != std::string::npos);
    other = options;
    other.chunk = static_cast<uint64_t>(bad) + 1;
    CHECK(refusal({path}, other).find("chunk is") != std::string::npos);
  }
  {
    Collector collector({path}, options);
    Memory memory(4096);
    FileReader& reader = *collector.reader;
    CHECK_THROWS(reader.submit({1, {{1, 0, 4096, 0}}, memory.data(), 4096, {}}));
    CHECK_THROWS(reader.submit({1, {{-1, 0, 4096, 0}}, memory.data(), 4096, {}}));
    CHECK_THROWS(reader.submit({1, {{0, 0, 4096, 1}}, memory.data(), 4096, {}}));
    CHECK_THROWS(reader.submit({1, {{0, 0, UINT64_MAX, 4}}, memory.data(), 4096, {}}));
    CHECK_THROWS(reader.submit({1, {{0, 0, 4096, 0}}, nullptr, 4096, {}}));
    CHECK(reader.stats().submitted == 0);
  }
  {
    Gate gate;
    Options other = options;
    other.fault = [&](int, uint64_t, uint64_t) {
      gate.pass();
      return ReadFault{};
    };
    Memory memory(4096);
    Collector collector({path}, other);
    collector.reader->submit({1, {{0, 0, 4096, 0}}, memory.data(), 4096, {}});
    CHECK_THROWS(collector.reader->submit({1, {{0, 0, 4096, 0}}, memory.data(), 4096, {}}));
    gate.open();
    CHECK(collector.wait(1).status == ReadResult::Ok);
  }
  CHECK(returns_to(threads, descriptors));
}

/// Descriptors run out: nothing of what was opened stays open.
void too_many_files(Options options) {
  const Folder folder;
  const std::vector<std::string> paths(100, folder.file("a", 1, 4096));
  rlimit before{};
  CHECK(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const std::size_t descriptors = entries_of("/proc/self/fd");
  const rlimit few{descriptors + 20, before.rlim_max};
  CHECK(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  const std::string text = refusal(paths, options);
  CHECK(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(text.find("raise the limit on open files") != std::string::npos);
  CHECK(entries_of("/proc/self/fd") == descriptors);
}

}  // namespace

int main() {
  ::alarm(200);  // a hang ends here
  for (const Options::Backend backend : backends()) {
    for (const bool direct : {true, false}) {
      Options options;
      options.backend = backend;
      options.direct = direct;
      errors(options);
      failure_is_one_requests_own(options);
      damaged_bytes(options);
      files_that_change(options);
      refuses_nonsense(options);
      too_many_files(options);
    }
  }
  return report("file_faults");
}
