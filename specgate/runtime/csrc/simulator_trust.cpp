#include "simulator_trust.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace specgate::sim {

void trusted(const Calls& calls, int64_t before, Trust& trust, int32_t* expert, float* p) {
  std::vector<std::pair<float, int32_t>> list;  // of one horizon
  std::vector<uint32_t> uses;
  for (int64_t step = 0, last = 0; step < calls.steps; ++step) {
    for (last = std::max(last, step); last < calls.steps && calls.document[last] == calls.document[step]; ++last) {
    }
    const int64_t end = last * calls.layers;  // of the document's events
    for (int64_t after = 0; after <= calls.layers; ++after) {
      const int64_t now = step * calls.layers + after - 1;
      if (after > 0) {
        uses.clear();
        for (int64_t i = calls.event_start[now]; i < calls.event_start[now + 1]; ++i) {
          uses.push_back(static_cast<uint32_t>((after - 1) * calls.experts + calls.expert[i]));
        }
        trust.used(uses, before + now);
      }
      trust.settle(before + now);
      const int64_t point = step * (calls.layers + 1) + after;
      for (int64_t i = calls.point_start[point], horizon_end = 0; i < calls.point_start[point + 1]; i = horizon_end) {
        const int64_t ahead = calls.horizon[i], due = now + ahead;
        list.clear();
        for (horizon_end = i; horizon_end < calls.point_start[point + 1] && calls.horizon[horizon_end] == ahead;
             ++horizon_end) {
          const int32_t e = calls.foreseen[horizon_end];
          const double said = calls.p[horizon_end];
          list.emplace_back(static_cast<float>(trust.of(said, ahead)), e);
          const auto block = static_cast<uint32_t>(due % calls.layers * calls.experts + e);
          if (due < end) trust.said(block, said, before + due, before + now);
        }
        const auto falls = [](const auto& a, const auto& b) { return a.first > b.first; };
        if (!std::is_sorted(list.begin(), list.end(), falls)) std::stable_sort(list.begin(), list.end(), falls);
        for (size_t k = 0; k < list.size(); ++k) p[i + static_cast<int64_t>(k)] = list[k].first;
        for (size_t k = 0; k < list.size(); ++k) expert[i + static_cast<int64_t>(k)] = list[k].second;
      }
    }
  }
  trust.settle(before + calls.events());
}

}  // namespace specgate::sim
