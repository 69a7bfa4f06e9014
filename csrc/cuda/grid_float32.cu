#include "grid_configs.h"

namespace fused_rin {
void append_float32_grid_instances(std::vector<BlockInstance>& instances) { FmaGridConfigs::append(instances); }
}  // namespace fused_rin
