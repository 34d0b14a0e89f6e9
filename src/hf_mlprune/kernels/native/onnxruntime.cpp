// The operator `BlockSparseLinear` of the domain `hf_mlprune` for ONNX Runtime from 1.17 up; needs neither torch nor
// Python.
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "onnxruntime_abi.h"
#include "product.h"

namespace mlprune {
namespace {

// What a function of ONNX Runtime answered.
struct Failed {
  ort::Status* status;
};

void must(ort::Status* status) {
  if (status) throw Failed{status};
}

// Nothing may be thrown at ONNX Runtime.
template <class Body>
ort::Status* guarded(const ort::Api* api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::bad_alloc&) {
    return ort::CreateStatus(api, ort::kFail, "no memory is left");
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::kInvalidArgument, error.what());
  }
}

// How many threads a session has, which it does not say. A product is shared out among as many as were seen at work at
// once; at the first, second, fourth, ... call among as many as there are processors, to see whether there are more.
class Team {
 public:
  int64_t next_parts() {
    const uint64_t call = calls_.fetch_add(1, std::memory_order_relaxed) + 1;
    return std::has_single_bit(call) ? kProcessors : seen_.load(std::memory_order_relaxed);
  }

  void see(int64_t threads) { raise(seen_, threads); }

  static void raise(std::atomic<int64_t>& most, int64_t value) {
    int64_t before = most.load(std::memory_order_relaxed);
    while (before < value && !most.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
    }
  }

 private:
  static inline const int64_t kProcessors = std::max(1u, std::thread::hardware_concurrency());
  std::atomic<uint64_t> calls_{0};
  std::atomic<int64_t> seen_{1};
};

// body(begin, end) for runs of 0 to count, one run per part.
template <class Body>
struct Job {
  const Body& body;
  const int64_t count, parts;
  std::atomic<int64_t> active{0}, most{0};
  std::atomic<bool> has_failed{false};

  static void run(void* data, size_t i) noexcept {
    auto& job = *static_cast<Job*>(data);
    const auto part = static_cast<int64_t>(i);
    Team::raise(job.most, job.active.fetch_add(1, std::memory_order_relaxed) + 1);
    try {
      job.body(job.count * part / job.parts, job.count * (part + 1) / job.parts);
    } catch (const std::bad_alloc&) {
      job.has_failed = true;
    }
    job.active.fetch_sub(1, std::memory_order_relaxed);
  }
};

// An input, contiguous as all of ONNX Runtime's tensors are, and of the type that it checked.
class Tensor : public Shape {
 public:
  Tensor(const ort::Api* api, const ort::Value* value) {
    ort::TensorTypeAndShapeInfo* info;
    must(ort::GetTensorTypeAndShape(api, value, &info));
    size_t count = 0;
    ort::Status* status = ort::GetDimensionsCount(api, info, &count);
    if (!status) {
      all_sizes_.resize(count);
      status = ort::GetDimensions(api, info, all_sizes_.data(), count);
    }
    ort::ReleaseTensorTypeAndShapeInfo(api, info);
    must(status);
    dim = static_cast<int64_t>(count);
    sizes = all_sizes_.data();
    check_sizes();
    must(ort::GetTensorMutableData(api, const_cast<ort::Value*>(value), &data_));
  }

  Tensor(const Tensor&) = delete;

  template <class Element>
  const Element* data() const {
    return static_cast<const Element*>(data_);
  }

 private:
  std::vector<int64_t> all_sizes_;
  void* data_;
};

enum Input : size_t { kX, kValues, kCrow, kCol, kBias, kPlaces, kInputs };
constexpr int kInputTypes[kInputs] = {ort::kFloat32, ort::kFloat32, ort::kInt32,
                                      ort::kInt32,   ort::kFloat32, ort::kInt64};

class Kernel {
 public:
  Kernel(const ort::Api* api, const ort::KernelInfo* info)
      : api_(api),
        activation_(required(info, "activation", "0 is for none")),
        scatter_size_(required(info, "scatter_size", "0 is for rows that stay where they are")),
        set_((check(best_instruction_set(), "this processor lacks AVX2 and FMA, which BlockSparseLinear needs"),
              find_instruction_set(attribute(info, "instruction_set").value_or(0)))) {}

  // y = act(x W^T + b), see set_sizes.
  void run(ort::KernelContext* context) {
    const Tensor x(api_, input(context, kX)), values(api_, input(context, kValues)), crow(api_, input(context, kCrow)),
        col(api_, input(context, kCol)), bias(api_, input(context, kBias));
    size_t inputs;
    must(ort::KernelContext_GetInputCount(api_, context, &inputs));
    std::optional<Tensor> places;
    if (inputs > kPlaces)
      if (const ort::Value* value = input(context, kPlaces)) places.emplace(api_, value);
    check(
        places.has_value() == (scatter_size_ != 0),
        "row_indices: expected with a scatter_size above 0, or neither; got scatter_size ", scatter_size_);
    Product p{};
    set_sizes(p, x, values, bias, places || bias.dim != 1 ? scatter_size_ : bias.sizes[0], activation_);
    const int64_t blocks = values.sizes[0], grid_rows = count_grid_rows(p);
    check(
        crow.is_list(grid_rows + 1), "crow_indices: expected (grid rows + 1,), here (", grid_rows + 1, ",)");
    check(col.is_list(blocks), "col_indices: expected one entry for each of ", blocks, " blocks");
    check(!places || places->is_list(p.rows), "row_indices: expected one place for each of ", p.rows, " rows");
    p.row_stride = p.columns;
    p.column_stride = 1;
    p.x = x.data<float>();
    p.values = values.data<float>();
    p.crow = crow.data<int32_t>();
    p.col = col.data<int32_t>();
    p.bias = bias.data<float>();
    if (places) p.row_places = places->data<int64_t>();
    check_structure(p, blocks);

    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
    sizes.back() = p.outputs;
    ort::Value* y;
    must(ort::KernelContext_GetOutput(api_, context, 0, sizes.data(), sizes.size(), &y));
    must(ort::GetTensorMutableData(api_, y, &p.y));
    if (p.tokens == 0 || p.outputs == 0) return;
    if (places) std::memset(p.y, 0, p.tokens * p.outputs * sizeof(float));
    if (p.rows > 0) multiply(p, context);
  }

  const ort::Api* api() const { return api_; }

 private:
  std::optional<int64_t> attribute(const ort::KernelInfo* info, const char* name) const {
    int64_t value;
    ort::Status* status = ort::KernelInfoGetAttribute_int64(api_, info, name, &value);
    if (!status) return value;
    ort::ReleaseStatus(api_, status);
    return std::nullopt;
  }

  int64_t required(const ort::KernelInfo* info, const char* name, const char* hint) const {
    const std::optional<int64_t> value = attribute(info, name);
    check(value.has_value(), "BlockSparseLinear: expected an attribute ", name, ", an integer; ", hint);
    return *value;
  }

  const ort::Value* input(const ort::KernelContext* context, size_t index) const {
    const ort::Value* value;
    must(ort::KernelContext_GetInput(api_, context, index, &value));
    return value;
  }

  void multiply(const Product& p, const ort::KernelContext* context) {
    const int64_t parts = is_worth_threads(p) ? team_.next_parts() : 1;
    share_out(p, set_, parts, [&]<class Body>(int64_t count, const Body& body) {
      Job<Body> job{body, count, parts};
      must(ort::KernelContext_ParallelFor(api_, context, &Job<Body>::run, parts, 0, &job));
      team_.see(job.most);
      if (job.has_failed) throw std::bad_alloc();
    });
  }

  const ort::Api* const api_;
  const int64_t activation_, scatter_size_;
  const InstructionSet& set_;
  Team team_;
};

const ort::CustomOp kOperator = {
    .version = ort::kVersion,
    .GetName = [](const ort::CustomOp*) { return "BlockSparseLinear"; },
    .GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; },
    .GetInputType = [](const ort::CustomOp*, size_t index) { return kInputTypes[index]; },
    .GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; },
    .GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat32; },
    .GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; },
    .KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    .GetInputCharacteristic =
        [](const ort::CustomOp*, size_t index) { return index == kPlaces ? ort::kOptional : ort::kRequired; },
    .GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; },
    .GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; },
    .CreateKernelV2 =
        [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
          return guarded(api, [&] { *kernel = new Kernel(api, info); });
        },
    .KernelComputeV2 =
        [](void* kernel, ort::KernelContext* context) {
          auto* own = static_cast<Kernel*>(kernel);
          return guarded(own->api(), [&] { own->run(context); });
        },
};

}  // namespace
}  // namespace mlprune

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What ONNX Runtime calls for a library that is given to its session options.
EXPORTED mlprune::ort::Status* RegisterCustomOps(
    mlprune::ort::SessionOptions* options, const mlprune::ort::ApiBase* base) {
  namespace ort = mlprune::ort;
  const ort::Api* api = base->GetApi(ort::kVersion);
  if (!api) {
    const std::string found = base->GetVersionString();
    return ort::CreateStatus(
        base->GetApi(1), ort::kFail, ("BlockSparseLinear: expected ONNX Runtime 1.17 or newer, got " + found).c_str());
  }
  return mlprune::guarded(api, [&] {
    // Lives as long as any session made with these options, which nobody tells us the end of: it is left to stay.
    ort::CustomOpDomain* domain;
    mlprune::must(ort::CreateCustomOpDomain(api, "hf_mlprune", &domain));
    mlprune::must(ort::CustomOpDomain_Add(api, domain, &mlprune::kOperator));
    mlprune::must(ort::AddCustomOpDomain(api, options, domain));
  });
}

// The best instruction set of this processor that there is code for; empty if there is none.
EXPORTED const char* hf_mlprune_instruction_set() {
  return mlprune::kInstructionSets[mlprune::best_instruction_set()].name;
}
