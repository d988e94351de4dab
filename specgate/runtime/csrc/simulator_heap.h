// Blocks in order of a key: a binary heap in flat memory that knows where each block stands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specgate::sim {

/// Least first: by group, a, b, block.
struct Key {
  double a = 0, b = 0;
  uint32_t block = 0;
  uint32_t group = 1;
};

inline bool before(const Key& x, const Key& y) {
  if (x.group != y.group) return x.group < y.group;
  if (x.a != y.a) return x.a < y.a;
  if (x.b != y.b) return x.b < y.b;
  return x.block < y.block;
}

/// A block is in at most one of the heaps that share a table of places.
class BlockHeap {
 public:
  /// `places[b]`: index of block b in its heap, -1 in none; outlives the heap.
  void init(std::vector<int32_t>* places, size_t capacity) {
    places_ = places->data();
    items_.clear();
    items_.reserve(capacity);
  }
  void clear() { items_.clear(); }
  bool empty() const { return items_.empty(); }
  size_t size() const { return items_.size(); }
  const Key& top() const { return items_.front(); }
  const Key& at(size_t i) const { return items_[i]; }

  void push(const Key& key) {
    items_.push_back(key);
    up(items_.size() - 1, key);
  }
  void remove(uint32_t block) {
    const auto i = static_cast<size_t>(places_[block]);
    places_[block] = -1;
    const Key last = items_.back();
    items_.pop_back();
    if (i < items_.size()) settle(i, last);
  }
  /// The key of a block that is in this heap.
  void update(const Key& key) { settle(static_cast<size_t>(places_[key.block]), key); }

 private:
  void put(size_t i, const Key& key) {
    items_[i] = key;
    places_[key.block] = static_cast<int32_t>(i);
  }
  void settle(size_t i, const Key& key) {
    if (i > 0 && before(key, items_[(i - 1) / 2])) {
      up(i, key);
    } else {
      down(i, key);
    }
  }
  void up(size_t i, const Key& key) {
    while (i > 0) {
      const size_t parent = (i - 1) / 2;
      if (!before(key, items_[parent])) break;
      put(i, items_[parent]);
      i = parent;
    }
    put(i, key);
  }
  void down(size_t i, const Key& key) {
    const size_t n = items_.size();
    for (size_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
      if (child + 1 < n && before(items_[child + 1], items_[child])) ++child;
      if (!before(items_[child], key)) break;
      put(i, items_[child]);
      i = child;
    }
    put(i, key);
  }

  int32_t* places_ = nullptr;
  std::vector<Key> items_;
};

}  // namespace specgate::sim
