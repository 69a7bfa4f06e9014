#include "block_configs.h"

namespace fused_rin {
void append_float32_unit_instances(std::vector<BlockInstance>& instances) { FmaUnitConfigs::append(instances); }
}  // namespace fused_rin
