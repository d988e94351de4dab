// Reads by threads that call pread: for kernels that refuse io_uring, as many containers do.
#pragma once

#include <thread>
#include <vector>

#include "read_queue.h"

namespace specgate {

class PreadPool : public ReadEngine {
 public:
  PreadPool(ReadQueue& queue, int threads);
  ~PreadPool() override;

  const char* name() const override { return "pread"; }
  void wake() override {}  // the threads wait in the queue itself
  void stop() override;

 private:
  void run();
  void drive(Transfer* transfer);

  ReadQueue& queue_;
  std::vector<std::thread> threads_;
};

}  // namespace specgate
