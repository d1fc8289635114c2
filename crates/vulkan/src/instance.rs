//! The loader, an instance, and what the validation layer says.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use ash::vk;

use crate::error::{Result, VulkanError};

/// The validation layer, when `PI0_VULKAN_VALIDATE` asks for it.
const LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";

/// What the layer complained about.
type Complaints = Mutex<Vec<String>>;

pub(crate) struct Instance {
    pub(crate) raw: ash::Instance,
    pub(crate) entry: ash::Entry,
    messenger: Option<(ash::ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    /// Boxed: the messenger holds its address.
    complaints: Box<Complaints>,
}

unsafe extern "system" fn on_message(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _kind: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the layer passes valid data for the length of the call, and `user` is the box that outlives the messenger.
    let (text, complaints) =
        unsafe { (CStr::from_ptr((*data).p_message).to_string_lossy(), &*user.cast::<Complaints>()) };
    complaints.lock().unwrap_or_else(PoisonError::into_inner).push(text.into_owned());
    vk::FALSE
}

impl Instance {
    pub(crate) fn new() -> Result<Arc<Self>> {
        // SAFETY: the system's Vulkan loader is trusted as every program with a window does.
        let entry = unsafe { ash::Entry::load() }.map_err(|e| VulkanError::NoLoader(e.to_string()))?;
        let validate = std::env::var_os("PI0_VULKAN_VALIDATE").is_some_and(|v| !v.is_empty() && v != "0");
        let app = vk::ApplicationInfo::default().application_name(c"pi0").api_version(vk::API_VERSION_1_3);
        let mut layers: Vec<*const c_char> = vec![];
        let mut extensions: Vec<*const c_char> = vec![];
        if validate {
            layers.push(LAYER.as_ptr());
            extensions.push(ash::ext::debug_utils::NAME.as_ptr());
        }
        // SAFETY: plain queries of the loader.
        let known = unsafe { entry.enumerate_instance_extension_properties(None) }.unwrap_or_default();
        let mut flags = vk::InstanceCreateFlags::empty();
        let portability = ash::khr::portability_enumeration::NAME;
        if known.iter().any(|e| e.extension_name_as_c_str() == Ok(portability)) {
            extensions.push(portability.as_ptr());
            flags |= vk::InstanceCreateFlags::ENUMERATE_PORTABILITY_KHR;
        }
        let info = vk::InstanceCreateInfo::default()
            .application_info(&app)
            .enabled_layer_names(&layers)
            .enabled_extension_names(&extensions)
            .flags(flags);
        // SAFETY: the names are static strings, and the layer was asked for.
        let raw = unsafe { entry.create_instance(&info, None) }.map_err(|e| match e {
            vk::Result::ERROR_INCOMPATIBLE_DRIVER => VulkanError::NoDriver,
            vk::Result::ERROR_LAYER_NOT_PRESENT => VulkanError::Lacks {
                device: "this system".into(),
                what: "the validation layer that PI0_VULKAN_VALIDATE asks for".into(),
            },
            e => VulkanError::call("vkCreateInstance")(e),
        })?;
        let complaints: Box<Complaints> = Box::default();
        let mut messenger = None;
        if validate {
            let utils = ash::ext::debug_utils::Instance::new(&entry, &raw);
            let info = vk::DebugUtilsMessengerCreateInfoEXT::default()
                .message_severity(vk::DebugUtilsMessageSeverityFlagsEXT::ERROR)
                .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
                .pfn_user_callback(Some(on_message))
                .user_data(std::ptr::from_ref::<Complaints>(&complaints).cast_mut().cast());
            // SAFETY: the callback and the box live as long as the messenger, which `drop` destroys first.
            match unsafe { utils.create_debug_utils_messenger(&info, None) } {
                Ok(m) => messenger = Some((utils, m)),
                Err(e) => {
                    // SAFETY: nothing was made from the instance that still lives.
                    unsafe { raw.destroy_instance(None) };
                    return Err(VulkanError::call("vkCreateDebugUtilsMessengerEXT")(e));
                }
            }
        }
        Ok(Arc::new(Self { raw, entry, messenger, complaints }))
    }

    /// Every GPU, in the driver's order.
    pub(crate) fn gpus(&self) -> Result<Vec<vk::PhysicalDevice>> {
        // SAFETY: a plain query.
        match unsafe { self.raw.enumerate_physical_devices() } {
            Ok(list) if list.is_empty() => Err(VulkanError::NoDriver),
            Ok(list) => Ok(list),
            Err(vk::Result::ERROR_INITIALIZATION_FAILED) => Err(VulkanError::NoDriver),
            Err(e) => Err(VulkanError::call("vkEnumeratePhysicalDevices")(e)),
        }
    }

    /// What the validation layer said since it was last asked, if anything.
    pub(crate) fn complaint(&self) -> Result<()> {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *complaints) {
            list if list.is_empty() => Ok(()),
            list => Err(VulkanError::Validation(list.join("\n"))),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: all that was made from the instance holds an `Arc` of it and is gone.
        unsafe {
            if let Some((utils, messenger)) = &self.messenger {
                utils.destroy_debug_utils_messenger(*messenger, None);
            }
            self.raw.destroy_instance(None);
        }
    }
}
