#include "block_configs.h"

namespace fused_rin {
void append_float32_fma_instances(std::vector<BlockInstance>& instances) { FmaConfigs::append(instances); }
}  // namespace fused_rin
