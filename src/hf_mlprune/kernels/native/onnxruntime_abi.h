// The part of ONNX Runtime's C interface that is used here, version 17 (ONNX Runtime 1.17): its own header is in no
// wheel. The interface only grows at its ends, so that later versions are the same up to there. Functions and fields
// have the names that they have in ONNX Runtime's documentation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlprune::ort {

constexpr uint32_t kVersion = 17;

struct Status;  // null where all went well
struct Value;
struct TensorTypeAndShapeInfo;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct CustomOp;

// Codes of errors.
constexpr int kFail = 1, kInvalidArgument = 2;
// Types of elements.
constexpr int kFloat32 = 1, kInt32 = 6, kInt64 = 7;
// Of an operator's inputs and outputs.
constexpr int kRequired = 0, kOptional = 1;
// Memory of the device that the operator runs on.
constexpr int kDefaultMemory = 0;

// A table of functions, see Entry.
struct Api;

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// One function of the table.
template <size_t kPlace, class Signature>
struct Entry;

template <size_t kPlace, class Result, class... Arguments>
struct Entry<kPlace, Result(Arguments...)> {
  Result operator()(const Api* api, Arguments... arguments) const {
    const auto* table = reinterpret_cast<void (*const*)()>(api);
    return reinterpret_cast<Result (*)(Arguments...)>(table[kPlace])(arguments...);
  }
};

inline constexpr Entry<0, Status*(int code, const char* message)> CreateStatus;
inline constexpr Entry<26, Status*(const char* name, CustomOpDomain**)> CreateCustomOpDomain;
inline constexpr Entry<27, Status*(CustomOpDomain*, const CustomOp*)> CustomOpDomain_Add;
inline constexpr Entry<28, Status*(SessionOptions*, CustomOpDomain*)> AddCustomOpDomain;
inline constexpr Entry<51, Status*(Value*, void**)> GetTensorMutableData;
inline constexpr Entry<61, Status*(const TensorTypeAndShapeInfo*, size_t*)> GetDimensionsCount;
inline constexpr Entry<62, Status*(const TensorTypeAndShapeInfo*, int64_t*, size_t count)> GetDimensions;
inline constexpr Entry<65, Status*(const Value*, TensorTypeAndShapeInfo**)> GetTensorTypeAndShape;
inline constexpr Entry<86, Status*(const KernelInfo*, const char* name, int64_t*)> KernelInfoGetAttribute_int64;
inline constexpr Entry<88, Status*(const KernelContext*, size_t*)> KernelContext_GetInputCount;
inline constexpr Entry<90, Status*(const KernelContext*, size_t index, const Value**)> KernelContext_GetInput;
inline constexpr Entry<91, Status*(KernelContext*, size_t index, const int64_t* sizes, size_t dim, Value**)>
    KernelContext_GetOutput;
inline constexpr Entry<93, void(Status*)> ReleaseStatus;
inline constexpr Entry<99, void(TensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo;
// Calls body(data, i) for i from 0 to count, by the threads of the session. With 0 batches each i is taken by itself.
inline constexpr Entry<
    274, Status*(const KernelContext*, void (*body)(void* data, size_t i), size_t count, size_t batches, void* data)>
    KernelContext_ParallelFor;

// An operator. Functions that end in V2 stand for those without; null ones are not called.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  void* InferOutputShapeFn;
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace mlprune::ort
