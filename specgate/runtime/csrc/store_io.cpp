// Memory and transfers of the store.
#include <algorithm>
#include <cstring>

#include "error.h"
#include "store.h"
#include "zstd.h"

namespace specgate {

namespace {

constexpr size_t kPage = 4096, kChunk = size_t{256} << 20;

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

void Store::allocate() {
  for (size_t c = 0; c < config_.formats.size(); ++c) {
    const size_t bytes = static_cast<size_t>(config_.device_slots[c]) * config_.formats[c].slot_bytes;
    std::byte* arena = device_->allocate(bytes);
    arenas_.push_back(arena);
    device_bytes_ += static_cast<int64_t>(bytes);
    if (config_.poison) device_->poison(arena, bytes, -1);
  }
  slab_at_.resize(config_.formats.size());
  for (size_t c = 0; c < config_.formats.size(); ++c) {
    const size_t slab = pages(config_.formats[c].block_bytes);
    auto count = static_cast<size_t>(config_.host_slots[c]);
    if (config_.ledger.resident_host) {
      count = static_cast<size_t>(std::count_if(config_.blocks.begin(), config_.blocks.end(),
                                                [c](const StoredBlock& block) { return block.shape_class == c; }));
    }
    staging_bytes_ = std::max(staging_bytes_, slab);
    if (!config_.memory.empty()) {  // somebody else's, who frees it
      for (size_t b = 0; b < config_.blocks.size(); ++b) {
        if (config_.blocks[b].shape_class == c) slab_at_[c].push_back(config_.memory[b]);
      }
      continue;
    }
    const size_t per_chunk = std::max<size_t>(1, kChunk / slab);
    for (size_t done = 0; done < count; done += per_chunk) {
      const size_t slabs = std::min(per_chunk, count - done);
      std::byte* memory = device_->allocate_host(slabs * slab);
      host_allocations_.emplace_back(memory, slabs * slab);
      host_bytes_ += static_cast<int64_t>(slabs * slab);
      for (size_t i = 0; i < slabs; ++i) slab_at_[c].push_back(memory + i * slab);
    }
  }
  for (const StoredBlock& block : config_.blocks) scratch_bytes_ = std::max(scratch_bytes_, pages(block.compressed));
}

void Store::free_all() {
  for (size_t c = 0; c < arenas_.size(); ++c) {
    device_->free(arenas_[c], static_cast<size_t>(config_.device_slots[c]) * config_.formats[c].slot_bytes);
  }
  for (const auto& [memory, bytes] : host_allocations_) device_->free_host(memory, bytes);
  arenas_.clear();
  slab_at_.clear();
  host_allocations_.clear();
  host_bytes_ = device_bytes_ = 0;
}

std::byte* Store::take(std::vector<std::byte*>& pool, size_t bytes) {
  if (pool.empty()) {
    std::byte* memory = device_->allocate_host(bytes);
    host_allocations_.emplace_back(memory, bytes);
    host_bytes_ += static_cast<int64_t>(bytes);
    return memory;
  }
  std::byte* memory = pool.back();
  pool.pop_back();
  return memory;
}

std::byte* Store::slab(uint32_t b) const {
  if (!config_.ledger.resident_host || closing_ || b >= ledger_->size()) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "slab " + std::to_string(b) + " has no address: only an open store of blocks in memory has some");
  }
  const Block& block = ledger_->block(b);
  return slab_at_[block.shape_class][static_cast<size_t>(block.slab)];
}

std::byte* Store::slab_of(const Job& job) const { return slab_at_[ledger_->block(job.block).shape_class][job.slab]; }

std::byte* Store::slot_of(const Job& job) const {
  const uint32_t c = ledger_->block(job.block).shape_class;
  return arenas_[c] + static_cast<size_t>(job.slot) * config_.formats[c].slot_bytes;
}

void Store::pump() {
  if (closing_) return;
  while (const std::optional<Job> job = ledger_->next_job()) start(*job);
}

void Store::start(const Job& job) {
  Flight& flight = flights_[job.id];
  flight.job = job;
  flight.begin_ns = now_ns();
  try {
    if (job.kind == JobKind::Copy) {
      start_copy(job, slab_of(job));
    } else {
      start_read(job);
    }
  } catch (const std::exception& problem) {  // no memory for a buffer, say: the job fails, not the caller of pump()
    land(job.id, JobStatus::Failed, problem.what());
  }
}

void Store::start_read(const Job& job) {
  Flight& flight = flights_[job.id];
  const StoredBlock& stored = config_.blocks[job.block];
  std::byte* target = nullptr;
  size_t capacity = pages(config_.formats[stored.shape_class].block_bytes);
  if (job.kind == JobKind::Direct) flight.staging = take(staging_, staging_bytes_);
  target = job.kind == JobKind::Direct ? flight.staging : slab_of(job);
  if (stored.compressed > 0) {
    flight.scratch = take(scratch_, scratch_bytes_);
    target = flight.scratch;
    capacity = scratch_bytes_;
  }
  ReadRequest request;
  request.id = static_cast<uint64_t>(job.id);
  request.segments = stored.segments;
  request.destination = target;
  request.capacity = capacity;
  request.crc = stored.crc;
  reader_->submit(std::move(request));
}

void Store::start_copy(const Job& job, const std::byte* from) {
  const uint32_t c = config_.blocks[job.block].shape_class;
  CopyRequest request;
  request.format = &config_.formats[c];
  request.from = from;
  request.slot = slot_of(job);
  request.slot_key = first_slot_[c] + job.slot;
  // a forecast that was read from the file may be waited for by now
  request.level = ledger_->block(job.block).pins > 0 ? Level::Demand : job.level;
  if (config_.poison) device_->poison(request.slot, request.format->slot_bytes, request.slot_key);
  const int64_t id = job.id;
  request.done = [this, id](JobStatus status, std::string error) { finish(id, status, error); };
  request.issued = [this, id, block = job.block] {
    bool tell = false;
    {
      const std::lock_guard lock(mutex_);
      if (flights_.count(id) > 0) copying_[block] = true;
      ledger_->sent(id);
      pump();  // the next forecast is chosen while the last pieces of this one are on their way
      tell = waiting_ > 0;
    }
    if (tell) changed_.notify_all();
  };
  copying_[job.block] = device_->copy(std::move(request));
}

void Store::finish(int64_t id, JobStatus status, const std::string& error) {
  bool tell = false;
  {
    const std::lock_guard lock(mutex_);
    if (status == JobStatus::Failed && device_->issued_is_enough()) broken_ = error;  // its readers went on already
    land(id, status, error);
    pump();
    tell = someone_waits();
  }
  if (tell) changed_.notify_all();
}

void Store::land(int64_t id, JobStatus status, const std::string& error) {
  const auto found = flights_.find(id);
  const Flight flight = found->second;
  flights_.erase(found);
  copying_[flight.job.block] = false;
  if (config_.price_scale >= 0 && flight.job.level == Level::Demand && status == JobStatus::Ok) {
    const int64_t now = now_ns();
    const auto bytes = static_cast<double>(ledger_->bytes(flight.job.block));
    if (flight.job.kind == JobKind::Read) {
      read_ns_ += static_cast<double>(now - flight.begin_ns);
      read_bytes_ += bytes;
    } else {
      pricer_.moved(bytes, static_cast<double>(now - std::max(flight.begin_ns, link_free_ns_)), true);
      link_free_ns_ = now;
    }
  }
  if (flight.scratch) scratch_.push_back(flight.scratch);
  if (flight.staging) staging_.push_back(flight.staging);
  if (timeline_.on()) {
    timeline_.add({flight.begin_ns, now_ns(), flight.job.block, static_cast<uint8_t>(flight.job.kind),
                   static_cast<uint8_t>(flight.job.level), static_cast<uint8_t>(status),
                   ledger_->bytes(flight.job.block)});
  }
  ledger_->complete(id, status);
  if (status == JobStatus::Failed) {
    for (const uint32_t b : ledger_->take_failed()) errors_[b] = error;
  }
}

void Store::read_done(ReadResult&& result) {
  const auto id = static_cast<int64_t>(result.id);
  {
    const std::lock_guard lock(mutex_);
    const Flight& flight = flights_.at(id);
    if (result.status != ReadResult::Ok || closing_) {
      const bool failed = result.status == ReadResult::Failed;
      land(id, failed ? JobStatus::Failed : JobStatus::Cancelled, result.error);
      pump();
    } else if (flight.scratch) {
      workers_->add([this, id] { decompress(id); });
      return;
    } else {
      read_landed(id);
    }
  }
  changed_.notify_all();
}

void Store::read_landed(int64_t id) {
  const Flight& flight = flights_.at(id);
  if (flight.job.kind == JobKind::Direct) {
    const Job job = flight.job;
    const std::byte* from = flight.staging;
    try {
      start_copy(job, from);
    } catch (const std::exception& problem) {
      land(id, JobStatus::Failed, problem.what());
    }
  } else {
    land(id, JobStatus::Ok, {});
  }
  pump();
}

void Store::decompress(int64_t id) {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  size_t compressed = 0, bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    const Flight& flight = flights_.at(id);
    const StoredBlock& stored = config_.blocks[flight.job.block];
    from = flight.scratch;
    compressed = stored.compressed;
    bytes = config_.formats[stored.shape_class].block_bytes;
    to = flight.staging ? flight.staging : slab_of(flight.job);
  }
  std::string error;
  try {
    const size_t got = zstd_decompress(to, bytes, from, compressed);
    if (got != bytes) {
      error = "an expert decompresses to " + std::to_string(got) + " bytes instead of " + std::to_string(bytes) +
              ": pack the model again";
    }
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  {
    const std::lock_guard lock(mutex_);
    if (!error.empty() || closing_) {
      land(id, error.empty() ? JobStatus::Cancelled : JobStatus::Failed, error);
      pump();
    } else {
      read_landed(id);
    }
  }
  changed_.notify_all();
}

}  // namespace specgate
