// Every byte of a segment is read once, and directly wherever that is possible; and the ring under the
// reader.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "read_plan.h"
#include "uring.h"

namespace {

using namespace specgate;

void plans_are_complete() {
  std::mt19937_64 random(3);
  const uint64_t alignments[] = {4, 512, 4096};
  for (int round = 0; round < 20000; ++round) {
    const uint64_t chunk = kPage << (random() % 9);
    const uint64_t unit = (random() % 2) ? kPage : 1 + random() % 5000;
    const uint64_t offset = random() % 300 * unit, length = random() % 300 * unit;
    const uintptr_t address = random() % 2 ? random() % 64 * kPage : random() % 100000;
    const bool direct = random() % 4 != 0;
    const uint64_t alignment = alignments[random() % 3];
    const std::vector<Piece> pieces = plan_reads(offset, length, address, direct, alignment, chunk);
    uint64_t at = offset, bounced = 0;
    for (const Piece& piece : pieces) {
      CHECK(piece.offset == at && piece.length > 0);
      at += piece.length;
      const uint64_t span = round_up(at, kPage) - round_down(piece.offset, kPage);
      CHECK(span <= chunk);
      if (!in_place(piece, address + (piece.offset - offset), alignment)) bounced += piece.length;
    }
    CHECK(at == offset + length);
    const uint64_t head = round_up(offset, kPage) - offset;
    const bool can = (address + head) % alignment == 0;
    // A long segment at a good remainder: all but its ends, which are less than a page each.
    if (direct && can && length > kBounceWhole) CHECK(bounced < 2 * kPage);
    if (direct && can && offset % kPage == 0 && length % kPage == 0) CHECK(bounced == 0);
  }
  CHECK(plan_reads(0, 16 << 20, 0, true, 4096, 1 << 20).size() == 16);
}

/// A read that waits for a pipe can be taken back.
void ring_reads_and_cancels() {
  std::string why;
  const std::unique_ptr<Ring> ring = Ring::make(8, why);
  if (ring == nullptr) {
    std::printf("no io_uring here: %s\n", why.c_str());
    CHECK(!why.empty());
    return;
  }
  int ends[2];
  CHECK(::pipe(ends) == 0);
  char text[8] = {};
  uint64_t tag = 0;
  int32_t result = 0;
  ring->read(ends[0], text, 4, 0, true, 1);
  CHECK(::write(ends[1], "abcd", 4) == 4);
  CHECK(ring->enter(true) == 0 && ring->next(tag, result) && tag == 1 && result == 4);
  CHECK(std::strcmp(text, "abcd") == 0);
  ring->read(ends[0], text, 4, 0, true, 2);
  ring->cancel(2, 3);
  int seen = 0;
  while (seen < 2) {
    CHECK(ring->enter(true) == 0);
    while (ring->next(tag, result)) {
      ++seen;
      if (tag == 2) CHECK(result == -ECANCELED || result == -EINTR);
    }
  }
  for (uint64_t i = 0; i < 40; ++i) ring->nop(100 + i);  // more than fit: handed over in between
  CHECK(ring->enter(true) == 0);
  uint64_t last = 99;
  while (ring->next(tag, result) || (last < 139 && ring->enter(true) == 0 && ring->next(tag, result))) {
    CHECK(tag == last + 1);
    last = tag;
  }
  CHECK(last == 139);
  ::close(ends[0]);
  ::close(ends[1]);
}

}  // namespace

int main() {
  ::alarm(120);
  plans_are_complete();
  ring_reads_and_cancels();
  return specgate::test::report("read_plan");
}
