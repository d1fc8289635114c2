//! What can go wrong between looking for Vulkan and reading a result.

use ash::vk;

/// A failure of Vulkan, or of what was asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VulkanError {
    /// The system has no Vulkan loader.
    #[error(
        "no Vulkan loader ({0}); install it (libvulkan1 on Debian and Ubuntu, vulkan-loader on Fedora; MoltenVK on \
         macOS)"
    )]
    NoLoader(String),
    /// There is a loader, and no driver behind it.
    #[error(
        "a Vulkan loader but no driver: install the GPU's driver with its Vulkan part (libnvidia-gl for NVIDIA, \
         mesa-vulkan-drivers for AMD and Intel); in a container give it the GPU's graphics capability \
         (NVIDIA_DRIVER_CAPABILITIES=all, or compute,graphics,utility)"
    )]
    NoDriver,
    /// No device of that number.
    #[error("there is no Vulkan device {wanted}; pi0 devices lists the {found} of this machine, from 0")]
    NoDevice {
        /// The number asked for.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// The driver lacks something that every kernel needs.
    #[error("{device} lacks {what}; a newer driver may have it")]
    Lacks {
        /// The GPU's name.
        device: String,
        /// What is missing.
        what: String,
    },
    /// Device memory is full.
    #[error(
        "out of device memory: {wanted} bytes more than the {held} held were wanted of {capacity}, {missing} are \
         missing{advice}"
    )]
    OutOfMemory {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes that this device holds already.
        held: u64,
        /// Bytes of the GPU's memory.
        capacity: u64,
        /// At least so many bytes are missing, as far as can be told.
        missing: u64,
        /// What would fit, if anything.
        advice: String,
    },
    /// One buffer would be larger than the driver allows.
    #[error("a buffer of {wanted} bytes, the driver binds at most {most}")]
    TooLarge {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes allowed.
        most: u64,
    },
    /// The driver gave the device up.
    #[error("the device was lost ({0}): it failed, was reset or unplugged; it must be opened again")]
    Lost(String),
    /// Work did not end in time.
    #[error("work did not end within {0} s; the device counts as lost and must be opened again")]
    Hung(u64),
    /// The validation layer complains: a bug here.
    #[error("the validation layer complains: {0}")]
    Validation(String),
    /// An earlier failure took this tensor's contents.
    #[error("this tensor was never computed: {0}")]
    NeverComputed(String),
    /// Any other failed call.
    #[error("{call} failed: {result}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        result: String,
    },
}

impl VulkanError {
    /// Whether only opening the device again can help.
    pub fn is_lost(&self) -> bool {
        matches!(self, VulkanError::Lost(_) | VulkanError::Hung(_))
    }

    pub(crate) fn call(call: &'static str) -> impl Fn(vk::Result) -> VulkanError {
        move |result| match result {
            vk::Result::ERROR_DEVICE_LOST => VulkanError::Lost(call.into()),
            result => VulkanError::Call { call, result: format!("{result:?}") },
        }
    }
}

impl From<VulkanError> for pi0_device::Error {
    fn from(e: VulkanError) -> Self {
        let (device, what) = (crate::device::NAME, e.to_string());
        match e.is_lost() {
            true => pi0_device::Error::Lost { device, what },
            false => pi0_device::Error::Failed { device, what },
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, VulkanError>;
